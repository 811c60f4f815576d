"""Time each phase of a training step of EfficientNet-B0 on each backend that has it, against what its bytes would take.

python benchmarks/phases.py --batch 64
"""

import argparse
import collections
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from suite import kernels
from torch import Tensor

import effkernels
from effkernels.ops._op import COMPOSITIONS, Op
from effkernels.profile import default_device
from effkernels.profiling.ceilings import measure_ceilings
from effkernels.profiling.timing import milliseconds, stamp

REPEATS = 10

Call = Callable[[], object]


def recorded(step: Callable[[], Tensor]) -> dict[tuple[Any, ...], list[Any]]:
    """Of the phases that a step calls: each kind once, with its op, its arguments and how often it is called."""
    calls: dict[tuple[Any, ...], list[Any]] = {}
    call = Op.__call__

    def spy(op: Op, backend: str, *arguments: Any) -> Any:
        if op.overloads.get(backend) not in COMPOSITIONS:
            kind = op.name, *((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in arguments)
            if kind not in calls:
                calls[kind] = [op, [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments], 0]
            calls[kind][2] += 1
        return call(op, backend, *arguments)

    with mock.patch.object(Op, "__call__", spy):
        step().backward()
    return calls


def microseconds(call: Call, device: torch.device) -> float:
    """Of one call among several; on a GPU of their kernels alone, replayed as a CUDA graph."""

    def several() -> None:
        for _ in range(REPEATS):
            call()

    call()
    run: Call = several
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        run = graph.replay
        run()
    start = stamp(device)
    run()
    end = stamp(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return milliseconds(start, end) / REPEATS * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default=default_device(), choices=("cpu", "cuda"))
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    form: dict[str, Any] = dict(device=device, memory_format=torch.channels_last)
    model = effkernels.convert(effkernels.models.create_model("efficientnet_b0")).to(**form)
    x = torch.randn(options.batch, 3, options.size, options.size).to(**form)
    backends = kernels(device, dtype)

    def step() -> Tensor:
        with effkernels.use_backend(backends[-1]), torch.autocast(device.type, dtype, enabled=device.type != "cpu"):
            return model(x).float().square().mean()

    rate = measure_ceilings(device, dtype).bandwidth
    print(f"{options.batch} images, {dtype}, microseconds; a copy moves {rate / 1e9:.0f} GB/s")
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
            total["floor"] += count * sum(op.bytes(arguments, outputs).values()) / rate * 1e6
    for name, total in sorted(totals.items(), key=lambda item: -max(item[1][b] for b in backends)):
        times = (f"{total[backend]:.0f}" if backend in total else "-" for backend in backends)
        print(row.format(name, total["calls"], f"{total['floor']:.0f}", *times))


if __name__ == "__main__":
    main()
