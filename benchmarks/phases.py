"""Time each phase of a training step of EfficientNet-B0 on each backend that has it, against what its bytes would take.

python benchmarks/phases.py --batch 64
"""

import argparse
import collections
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from suite import kernels
from torch import Tensor

import effkernels
from effkernels.ops._op import COMPOSITIONS, Op

REPEATS = 10

Call = Callable[[], object]


def recorded(step: Callable[[], Tensor]) -> dict[tuple[Any, ...], list[Any]]:
    """Of the phases that a step calls: each kind once, with its op, its arguments and how often it is called."""
    calls: dict[tuple[Any, ...], list[Any]] = {}
    call = Op.__call__

    def spy(op: Op, backend: str, *arguments: Any) -> Any:
        if op.overloads.get(backend) not in COMPOSITIONS:
            kind = op.name, *((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in arguments)
            kept = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
            calls.setdefault(kind, [op, kept, 0])[2] += 1
        return call(op, backend, *arguments)

    with mock.patch.object(Op, "__call__", spy):
        step().backward()
    return calls


def microseconds(call: Call, device: str) -> float:
    """Of one call among several; on a GPU of their kernels alone, replayed as a CUDA graph."""
    call()
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(REPEATS):
            call()
        return (time.perf_counter() - start) / REPEATS * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS * 1e3


def bandwidth(device: str) -> float:
    """Bytes that a large copy reads and writes in a microsecond."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    device = options.device
    dtype = torch.float32 if device == "cpu" else torch.float16
    form: dict[str, Any] = dict(device=device, memory_format=torch.channels_last)
    model = effkernels.convert(effkernels.models.create_model("efficientnet_b0")).to(**form)
    x = torch.randn(options.batch, 3, options.size, options.size).to(**form)
    backends = kernels(torch.device(device), dtype)

    def step() -> Tensor:
        with effkernels.use_backend(backends[-1]), torch.autocast(device, dtype, enabled=device != "cpu"):
            return model(x).float().square().mean()

    rate = bandwidth(device)
    print(f"{options.batch} images, {dtype}, microseconds; a copy moves {rate / 1e3:.0f} GB/s")
    row = "{:20} {:>5} {:>8}" + len(backends) * " {:>9}"
    print(row.format("phase", "calls", "floor", *backends))
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with torch.no_grad():
        for op, arguments, count in recorded(torch.enable_grad()(step)).values():
            total = totals[op.name]
            total["calls"] += count
            for backend in op.overloads.keys() & backends:
                call = lambda: op.overloads[backend](*arguments)  # noqa: B023, E731
                total[backend] += count * microseconds(call, device)
            outputs = call()
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            total["floor"] += count * sum(op.bytes(arguments, outputs).values()) / rate
    for name, total in sorted(totals.items(), key=lambda item: -max(item[1][b] for b in backends)):
        times = (f"{total[backend]:.0f}" if backend in total else "-" for backend in backends)
        print(row.format(name, total["calls"], f"{total['floor']:.0f}", *times))


if __name__ == "__main__":
    main()
