"""Cases of `pointwise` and `pointwise_backward`."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from effkernels.ops._activation import Activation
from effkernels.ops._cases import CUTS, DTYPES, Case, Comparison, Norm, as_float64, feature_map, maps
from effkernels.ops._op import Op
from effkernels.ops.batch_norm.cases import SMOOTH, compare_sums, image_vectors, memory_of
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.pointwise import reference
from effkernels.ops.pointwise.op import POINTWISE, POINTWISE_BACKWARD

NOTHING, SILU = Norm(statistics=False), Norm(Activation.SILU)


def _weight(outputs: int, channels: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(outputs, channels) / channels**0.5).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Pointwise(Case):
    op: ClassVar[Op] = POINTWISE
    shape: tuple[int, int, int, int]
    outputs: int = 19
    layout: str = "nchw"
    values: str = "normal"
    norm: Norm = NOTHING
    gated: bool = False
    bias: bool = False
    residual: bool = False
    reduce: Reduce = Reduce.NONE

    def make(self) -> tuple[Any, ...]:
        n, channels, *size = self.shape
        x = feature_map(self.shape, self.dtype, self.layout, self.values)
        gate, _ = image_vectors(self.shape, self.dtype, self.gated)
        bias = torch.randn(self.outputs).to(torch.promote_types(self.dtype, torch.float32)) if self.bias else None
        residual = feature_map((n, self.outputs, *size), self.dtype, self.layout) if self.residual else None
        weight, norm = _weight(self.outputs, channels, self.dtype), self.norm.make(channels, self.dtype)
        return x, weight, *norm, gate, bias, residual, self.reduce

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        (eager, _), (exact, _) = (reference.pointwise(*a) for a in (arguments, as_float64(arguments)))
        yield Comparison("y", outputs[0], eager, exact)
        yield from compare_sums(outputs[1], outputs[0], self.reduce)


@dataclass(frozen=True, kw_only=True)
class PointwiseBackward(Case):
    op: ClassVar[Op] = POINTWISE_BACKWARD
    shape: tuple[int, int, int, int]
    outputs: int = 19
    layout: str = "nchw"
    norm: Norm = SILU
    scaled: bool = False
    gated: bool = False
    fixed: bool = False
    needs: tuple[bool, bool] = (True, True)

    def make(self) -> tuple[Any, ...]:
        n, channels, *size = self.shape
        out = (n, self.outputs, *size)
        x = feature_map(self.shape, self.dtype, self.layout)
        grad, y = (feature_map(out, self.dtype, memory_of(self.layout)) for _ in range(2))
        mean2, var2, gamma2, _, eps2, _ = Norm().make(self.outputs, self.dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        means = None if self.fixed else 0.2 * torch.randn(2, self.outputs).to(wide)
        scale, gate = (
            image_vectors(out, self.dtype, self.scaled)[0],
            image_vectors(self.shape, self.dtype, self.gated)[0],
        )
        weight, norm = _weight(self.outputs, channels, self.dtype), self.norm.make(channels, self.dtype)
        return grad, scale, y, mean2, var2, gamma2, eps2, means, weight, x, *norm, gate, *self.needs

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        eager, exact = (reference.pointwise_backward(*a) for a in (arguments, as_float64(arguments)))
        for i, name, needed in ((0, "grad_gated", self.needs[0]), (2, "grad_weight", self.needs[1])):
            if needed:
                yield Comparison(name, outputs[i], eager[i], exact[i])
        if self.needs[0] and self.norm.statistics:
            # Those of the gradient as stored, whatever its own error.
            given = (outputs[0], *arguments[9:16])
            sums = [reference.gated_sums(*a) for a in (given, as_float64(given))]
            yield Comparison("sums", outputs[1], *sums)


f32, f16, bf16 = DTYPES

# Single tiles, and blocks of channels, outputs and pixels of which the last is not whole.
CORE: list[dict[str, Any]] = [
    dict(shape=(3, 2, 1, 1), outputs=3),
    dict(shape=(2, 17, 5, 7), outputs=19, dtype=f16),
    dict(shape=(2, 17, 5, 7), outputs=19, layout="channels_last", dtype=bf16),
    dict(shape=(1, 72, 3, 8), outputs=40, dtype=bf16),
    dict(shape=(1, 72, 3, 8), outputs=40, layout="channels_last", dtype=f16),
    dict(shape=(1, 40, 3, 7), outputs=24, layout="channels_last"),
    dict(shape=(2, 24, 3, 4), layout="sliced nchw"),
    dict(shape=(2, 24, 3, 4), layout="sliced channels_last", dtype=f16),
    dict(shape=(0, 3, 6, 7)),
]
MAPS: list[dict[str, Any]] = [
    dict(shape=(2, 17, 7, 7), outputs=129),
    dict(shape=(2, 129, 13, 15), outputs=17, layout="channels_last"),
    dict(shape=(1, 96, 30, 32), outputs=24, layout="channels_last"),
    dict(shape=(2, 24, 14, 14), outputs=144),
    dict(shape=(2, 300, 7, 7), outputs=70, layout="channels_last"),
    dict(shape=(2, 24, 6, 7), layout="sliced nchw"),
    dict(shape=(2, 24, 6, 7), layout="sliced channels_last"),
]


def _cases() -> Iterator[Case]:
    numbers = random.Random(0)
    for m in (*(dict(tag="core", **core) for core in CORE), *(dict(m, dtype=d) for m in MAPS for d in DTYPES)):
        yield Pointwise(reduce=Reduce.STATISTICS, **m)
        yield Pointwise(norm=SILU, gated=True, bias=True, residual=True, reduce=Reduce.MEAN, **m)
        yield PointwiseBackward(scaled=True, gated=True, **m)
    for layout in ("nchw", "channels_last"):
        yield PointwiseBackward(tag="core", shape=(2, 24, 3, 4), layout=layout, norm=NOTHING)
    for needs in ((True, False), (False, True)):
        yield PointwiseBackward(shape=(2, 17, 7, 9), gated=True, needs=needs)
    for layout in ("nchw", "channels_last"):
        yield Pointwise(shape=(0, 3, 6, 7), layout=layout, norm=SILU, reduce=Reduce.MEAN)
        yield Pointwise(shape=(2, 32, 13, 15), layout=layout, values="offset", reduce=Reduce.STATISTICS)
    for m in (*maps(numbers), *(dict(shape=(2, 24, 6, 10), layout=f"{cut} nchw") for cut in CUTS)):
        outputs = numbers.choice((1, 16, 50))
        yield Pointwise(
            outputs=outputs, norm=Norm(numbers.choice(SMOOTH)), bias=numbers.choice((False, True)),
            residual=numbers.choice((False, True)), reduce=numbers.choice(list(Reduce)), **m,
        )  # fmt: skip
        yield PointwiseBackward(
            outputs=outputs, norm=Norm(numbers.choice(SMOOTH), affine=False), fixed=numbers.choice((False, True)), **m
        )


CASES = list(_cases())
