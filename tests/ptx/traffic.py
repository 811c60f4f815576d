"""Memory traffic of the CUDA kernels, counted by ptxrun. `python tests/ptx/traffic.py` writes docs/traffic.md."""

import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # as pytest does

import emulated_cuda
import torch
from torch import Tensor

from effkernels.ops._activation import Activation
from effkernels.ops._cases import Case, Norm, cases_for
from effkernels.ops.batch_norm.cases import BnApply, BnStatistics
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv.cases import Dwconv
from effkernels.ops.mbconv_inference.cases import MbconvInference
from effkernels.ops.squeeze_excite.cases import ChannelScale, SpatialMean
from effkernels.ops.squeeze_excite.op import CHANNEL_SCALE

SECTOR = 32
TABLE = pathlib.Path(__file__).parents[2] / "docs" / "traffic.md"


class Traffic(NamedTuple):
    """Of one tensor, in bytes."""

    name: str
    bytes: int  # as the op says
    whole: bool
    unique: int  # of the sectors touched
    blocks: int  # of the sectors that each block touches, summed: reads behind a perfect L1
    wasted: float  # share of the sectors that a warp's accesses touch, beyond the least that hold their bytes

    @property
    def factor(self) -> float:
        """How often it is read, by different blocks."""
        return self.blocks / self.unique if self.unique else 1.0


def sectors(size: int) -> int:
    return -(-size // SECTOR) * SECTOR


def countable_cases() -> list[Case]:
    """Those whose tensors are dense, as a gap between rows may share a sector with them, and are read by one launch."""
    cases = [c for c in cases_for("cuda", "core") if not (isinstance(c, MbconvInference) and c.residual)]
    return [c for c in cases if getattr(c, "layout", "nchw") in ("nchw", "channels_last") and "strided" not in str(c)]


def table_cases() -> list[Case]:
    """As a network calls the ops, on maps of a few blocks."""
    silu = Norm(Activation.SILU)
    of_map = dict(shape=(2, 96, 28, 28), dtype=torch.float16)
    return [
        case
        for layout in ("channels_last", "nchw")
        for case in (
            *(
                Dwconv(**of_map, layout=layout, kernel_size=k, stride=stride, epilogue=silu, reduce=Reduce.MEAN)
                for k in (3, 5)
                for stride in (1, 2)
            ),
            BnStatistics(**of_map, layout=layout),
            BnApply(**of_map, layout=layout, reduce=Reduce.MEAN),
            SpatialMean(**of_map, layout=layout),
            ChannelScale(**of_map, layout=layout),
        )
    ]


@functools.cache
def count(case: Case) -> tuple[Traffic, ...]:
    return tuple(_count(case))


def _count(case: Case) -> Iterator[Traffic]:
    arguments = case.arguments()
    emulated_cuda.options = {"profile": True}
    emulated_cuda.launches.clear()
    outputs = case.op("cuda", *arguments)
    schema = case.op.overloads["cuda"]._schema
    returned = (outputs,) if isinstance(outputs, Tensor) else outputs
    tensors = [(a.name, t) for a, t in zip(schema.arguments, arguments, strict=True) if isinstance(t, Tensor)]
    tensors += [(r.name or "result", t) for r, t in zip(schema.returns, returned, strict=True)]
    amounts = case.op.bytes(arguments, outputs)
    for name, tensor in tensors:
        seen = [
            launch.result.profile.buffer(launch.tensors[tensor.data_ptr()])
            for launch in emulated_cuda.launches
            if tensor.numel() and tensor.data_ptr() in launch.tensors
        ]
        touched = sum(b.load_sectors + b.store_sectors for b in seen) * SECTOR
        used = sum(b.bytes_loaded + b.bytes_stored for b in seen)
        yield Traffic(
            name,
            amounts.get(name, 0),
            amounts.get(name, 0) == tensor.nbytes,
            round(sum(b.unique_loaded + b.unique_stored for b in seen)) * SECTOR,
            round(sum(b.block_sectors + b.unique_stored for b in seen)) * SECTOR,
            max(0.0, 1 - used / touched) if touched else 0.0,
        )


def table() -> str:
    lines = [
        "# Memory traffic of the CUDA kernels",
        "",
        "Counted in emulation, while ptxrun executed their PTX on a CPU, by `python tests/ptx/traffic.py`.",
        "`bytes` is what the op says that it reads and writes; `counted` are the 32-byte sectors touched, each once;",
        "`read again` is how often x is read by different blocks (halos; 1 is once), before any cache; `wasted` is the",
        "share of the sectors of all accesses to x and y that holds nothing asked for.",
        "",
        "| op | bytes | counted | x read again | x wasted | y wasted |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in table_cases():
        of = {t.name: t for t in count(case)}
        y = of.get("result" if case.op is CHANNEL_SCALE else "y")
        total, counted = (sum(getattr(t, field) for t in of.values()) for field in ("bytes", "unique"))
        wasted = [f"{t.wasted:.0%}" if t else "" for t in (of["x"], y)]
        lines.append(f"| {case} | {total} | {counted} | {of['x'].factor:.2f} | {wasted[0]} | {wasted[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with emulated_cuda.installed():
        TABLE.write_text(table())
