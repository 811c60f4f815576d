"""The memory of a training step of EfficientNet-B0: what is kept for backward, and the peak."""

import concurrent.futures
import multiprocessing

import pytest
import suite
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import effkernels
from effkernels.profiling.memory import resident
from effkernels.profiling.saved import saved_bytes

SIZE = 224
REPEATS = 3  # of what varies from one process to the next
MIB = 2**20


def network(implementation: str, form: dict) -> nn.Module:
    model = torchvision.models.efficientnet_b0().to(**form)
    if suite.is_ours(implementation):
        effkernels.convert(model, memory="minimal" if "minimal" in implementation else "default")
    return model


def implementations(setting: suite.Setting, dtype: torch.dtype) -> list[str]:
    return [
        "eager",
        *(f"{name}{memory}" for name in suite.kernels(setting.device, dtype) for memory in ("", " minimal")),
    ]


@pytest.mark.benchmark(group="memory")
def test_kept_for_backward(benchmark, setting, dtype):
    """By the blocks."""
    form = {"device": setting.device, "dtype": dtype}
    x = torch.randn(suite.BATCH, 32, SIZE // 2, SIZE // 2, **form)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def kept(implementation: str) -> float:
        blocks = network(implementation, form).features[1:8]
        with effkernels.use_backend(implementation.split()[0]):
            return sum(saved_bytes(blocks, x, parameters=blocks.parameters())) / MIB

    found = benchmark.pedantic(lambda: {name: [kept(name)] for name in implementations(setting, dtype)})
    suite.keep(benchmark, setting, "MiB", found)


@pytest.mark.benchmark(group="memory")
def test_peak(benchmark, setting, layout, dtype):
    """What a fresh process grows by in a step; on a GPU, of allocated memory."""
    context = multiprocessing.get_context("spawn")

    def grown(implementation: str) -> float:
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            arguments = implementation, setting.device, dtype, layout, torch.get_num_threads()
            return pool.submit(peak_memory, *arguments).result() / MIB

    names = implementations(setting, dtype)
    found = benchmark.pedantic(lambda: {name: [grown(name) for _ in range(REPEATS)] for name in names})
    suite.keep(benchmark, setting, "MiB", {f"{name} {layout}": values for name, values in found.items()})


def peak_memory(implementation: str, device: torch.device, dtype: torch.dtype, layout: str, threads: int) -> int:
    torch.set_num_threads(threads)
    form = {"device": device, "dtype": dtype, "memory_format": suite.LAYOUTS[layout]}
    model = network(implementation, form)

    def step(batch: int, size: int) -> None:
        x, labels = torch.randn(batch, 3, size, size).to(**form), torch.arange(batch, device=device)
        F.cross_entropy(model(x), labels).backward()
        model.zero_grad()

    with effkernels.use_backend(implementation.split()[0]):
        for _ in range(2):
            step(2, 32)  # next to nothing but what every step takes
        before = _memory(device, "VmRSS")
        step(suite.BATCH, SIZE)
        return _memory(device, "VmHWM") - before


def _memory(device: torch.device, field: str) -> int:
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated if field == "VmHWM" else torch.cuda.memory_allocated
        return allocated(device)
    return resident(field)
