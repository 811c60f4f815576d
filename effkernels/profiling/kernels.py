"""Time by kernel, as torch.profiler has it."""

import os
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from effkernels.profiling.workload import Workload

STEPS = 3
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, such as that there is no GPU


class Kernel(NamedTuple):
    """Of one run."""

    name: str
    calls: float
    milliseconds: float  # without what it calls


def time_kernels(workload: Workload) -> list[Kernel]:
    """PyTorch's ops and ours on the CPU, kernels on a GPU: the longest first."""
    on_gpu = workload.x.is_cuda
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(STEPS):
            workload.run()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = []
    for event in profiler.key_averages():
        if on_gpu and event.device_type.name != "CUDA":
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append(Kernel(event.key, event.count / STEPS, microseconds / 1000 / STEPS))
    return sorted(kernels, key=lambda kernel: -kernel.milliseconds)
