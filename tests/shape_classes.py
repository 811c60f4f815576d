"""The classes of MBConv blocks that networks have, by what decides how the GPU computes them, each with a small block.

`python tests/shape_classes.py` prints the table of docs/gpu_inference.md.
"""

import functools
import itertools
import pathlib
import sys
from collections import Counter
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))  # as pytest does

import make_shapes
import torch
from make_shapes import Block

from effkernels import _native
from effkernels.models.configs import CONFIGS
from effkernels.ops.mbconv_inference.cases import MbconvInference

BATCHES = (1, 8)
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "gpu_inference.md"


def blocks(model: str) -> Counter[Block]:
    """The MBConv blocks of a network, each as often as it occurs."""
    return Counter({block: n for block, n in make_shapes.blocks(CONFIGS[model]).items() if block.kind == "mbconv"})


def case_of(block: Block, batch: int, size: int, dtype: torch.dtype = torch.float16) -> MbconvInference:
    """A block on a map of another size."""
    return MbconvInference(
        dtype=dtype, shape=(batch, block.in_channels, size, size), outputs=block.out_channels,
        ratio=block.expand_ratio if block.expand_ratio > 1 else 0, kernel_size=block.kernel_size, stride=block.stride,
        squeezed=block.se_channels, residual=block.stride == 1 and block.in_channels == block.out_channels,
    )  # fmt: skip


class ShapeClass(NamedTuple):
    """Of blocks in 16 bits, in channels_last; see docs/gpu_inference.md for what the terms mean."""

    kernel_size: int
    stride: int
    residual: bool
    squeeze_excite: bool
    expansion: str  # none, inside the depthwise kernel, or a launch of its own
    group: int  # of the tile inside: channels that are expanded at a time
    shares: bool  # whether several blocks work on one tile
    whole_depth: bool  # whether C is whole steps of a matrix instruction
    whole_groups: bool  # whether the hidden channels are whole groups

    def __str__(self) -> str:
        words = [f"k{self.kernel_size}s{self.stride}", f"expansion {self.expansion}"]
        if self.group:
            words.append(f"by {self.group}")
        flags = self._asdict().items()
        return " ".join(words + [name for name, value in flags if value is True])

    @property
    def launches(self) -> int:
        return 2 + self.squeeze_excite + (self.expansion == "launch")


def class_of(case: MbconvInference, multiprocessors: int = 108) -> ShapeClass:
    """By the plan that the launcher makes, too."""
    (n, c, size, _), k = case.shape, case.kernel_size
    hidden, out = c * case.ratio, -(-size // case.stride)
    expansion, group, shares = "none", 0, False
    if case.ratio:
        maps = (torch.empty(s, device="meta").to(memory_format=torch.channels_last)
                for s in ((n, c, size, size), (n, hidden, out, out)))  # fmt: skip
        norm = ((0,) * 4, 0.0, 0, 0)
        plan = _native.introspection.expand_dwconv_plan(
            *((0, list(m.shape), list(m.stride())) for m in maps), "float16", expand=0, norm1=norm, depthwise=0,
            norm2=norm, kernel_size=k, stride=case.stride, pad_top=k // 2, pad_left=k // 2,
            reduce=int(case.squeezed > 0), tf32=False, multiprocessors=multiprocessors,
        )  # fmt: skip
        expansion = "inside" if plan and plan["worthwhile"] else "launch"
        if expansion == "inside":
            group = plan["tile"]["group"]
            shares = plan["tile"]["groups_each"] * group < hidden
    return ShapeClass(
        k, case.stride, case.residual, case.squeezed > 0, expansion, group, shares, c % 16 == 0,
        group == 0 or hidden % group == 0,
    )  # fmt: skip


class Small(NamedTuple):
    """A block of a network on a small map, planned for a GPU with so few multiprocessors that the class stays."""

    block: Block
    size: int
    multiprocessors: int

    def case(self, dtype: torch.dtype = torch.float16) -> MbconvInference:
        return case_of(self.block, 1, self.size, dtype)


def classified(model: str) -> list[tuple[Block, ShapeClass]]:
    """The blocks of a network at its resolution, in each of `BATCHES`."""
    return [(b, class_of(case_of(b, batch, b.size))) for b in blocks(model) for batch in BATCHES]


@functools.cache
def classes() -> dict[ShapeClass, Small]:
    """Those of every MBConv block of every model, at the model's resolution and in every batch."""
    members: dict[ShapeClass, list[Block]] = {}
    for block, shape_class in itertools.chain.from_iterable(map(classified, CONFIGS)):
        members.setdefault(shape_class, []).append(block)
    return {shape_class: small(shape_class, of) for shape_class, of in members.items()}


def small(shape_class: ShapeClass, members: list[Block]) -> Small:
    """The one of the fewest channels, on the smallest map of some tiles; that many fill a smaller GPU."""
    members = sorted(members, key=lambda block: block.in_channels * block.expand_ratio)
    for found in itertools.starmap(Small, itertools.product(members, range(10, 32), range(1, 109))):
        if class_of(found.case(), found.multiprocessors) == shape_class:
            return found
    raise LookupError(f"no small block is of the class {shape_class}")


@functools.cache
def sample() -> dict[ShapeClass, Small]:
    """Classes that show every two properties which any class has together: of little work first."""

    def work(of: tuple[ShapeClass, Small]) -> int:
        block, size, _ = of[1]
        return size**2 * block.in_channels * block.expand_ratio * (block.in_channels + block.out_channels)

    seen: set[tuple[tuple[str, Any], ...]] = set()
    found = {}
    for shape_class, of in sorted(classes().items(), key=work):
        pairs = {*itertools.combinations(shape_class._asdict().items(), 2)}
        if not pairs <= seen:
            found[shape_class] = of
        seen |= pairs
    return found


def table() -> str:
    lines = ["| model | block shapes | classes | launches | in 4 launches, C |", "|---|---:|---:|---:|---|"]
    for model in CONFIGS:
        found = classified(model)
        four = sorted({block.in_channels for block, of in found if of.launches > 3})
        launches = sorted({of.launches for _, of in found})
        counts = len(blocks(model)), len({of for _, of in found}), " or ".join(map(str, launches))
        lines.append(f"| {model} | {' | '.join(map(str, counts))} | {', '.join(map(str, four))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
