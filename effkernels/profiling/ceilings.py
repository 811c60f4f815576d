"""What a device reaches at most, measured: with a large copy and large matrix products."""

from collections.abc import Callable
from typing import Any

import torch

from effkernels.profiling.gpus import Ceilings
from effkernels.profiling.timing import milliseconds, stamp

COPY_BYTES = 1 << 28
REPEATS = 5


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of a few repeats."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY_BYTES / _seconds(device, lambda: target.copy_(source))
    vector = _products(device, torch.float32)
    return Ceilings(bandwidth, vector if dtype == torch.float32 else _products(device, dtype), vector)


def _products(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones((n, n), dtype=dtype, device=device)
    return 2 * n**3 / _seconds(device, lambda: a @ a)


def _seconds(device: torch.device, call: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = stamp(device)
        call()
        end = stamp(device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(milliseconds(start, end) / 1000)
    return min(times)
