"""The peak memory of a run: of a fresh process, or of the GPU's allocator."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import torch

from effkernels.profiling.workload import Workload

_STATUS, _CLEAR = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def peak_bytes(workload: Workload, request: dict[str, Any]) -> int | None:
    """What a run takes at most beside the model and its input; None where this system does not tell.

    On the CPU a new process runs what `request` describes, the arguments of `profiling.measure.prepare`: of its growth
    over what a run on one smaller image has left.
    """
    if workload.x.is_cuda:
        workload.run()
        workload.model.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        workload.run()
        return torch.cuda.max_memory_allocated() - before
    if not _CLEAR.exists():
        return None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "ignore", "-m", "effkernels.profiling.memory", json.dumps(request)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True).stdout)


def main() -> None:
    from effkernels.profiling.measure import prepare

    workload = prepare(**json.loads(sys.argv[1]))
    n, c, h, w = workload.x.shape
    small = torch.zeros(1 if not workload.train else min(n, 2), c, h // 2, w // 2).to(workload.x)
    Workload(workload.model, small, workload.train, workload.backend).run()
    workload.model.zero_grad()
    _CLEAR.write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    workload.run()
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """The bytes of this process in memory: now, "VmRSS", or at most so far, "VmHWM" (proc(5))."""
    return next(1024 * int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field))


if __name__ == "__main__":
    main()
