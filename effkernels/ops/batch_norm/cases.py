"""Cases of the BatchNorm phases, and how the sums of any op's output are held against it."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from effkernels.ops._activation import Activation
from effkernels.ops._cases import CUTS, DTYPES, Case, Comparison, Norm, as_float64, drawn_map, feature_map, huge, maps
from effkernels.ops._op import Op
from effkernels.ops.batch_norm import reference
from effkernels.ops.batch_norm.op import (
    BN_APPLY,
    BN_BACKWARD,
    BN_BACKWARD_SUMS,
    BN_POOL,
    BN_RESIDUAL,
    BN_STATISTICS,
    Reduce,
    statistics_dtype,
)

SILU = Norm(Activation.SILU)
REDUCTIONS = (Reduce.NONE, Reduce.MEAN)
# Between layers, those whose slope has no jumps: a value at a jump may be on either side of it.
SMOOTH = (Activation.IDENTITY, Activation.SILU, Activation.HARDSWISH)


def compare_sums(sums: Tensor, y: Tensor, reduce: int) -> Iterator[Comparison]:
    """`sums` are those of `y` as stored, whatever its own error."""
    if reduce == Reduce.MEAN:
        eager, exact = (v.mean((2, 3), dtype=statistics_dtype(v)) for v in (y, y.double()))
        yield Comparison("mean", sums, eager, exact)
    elif reduce == Reduce.STATISTICS:
        eager, exact = (reference.statistics(v) for v in (y, y.double()))
        yield Comparison("variance", sums[1], eager[1], exact[1])
        # A mean near zero is as exact as the deviation allows.
        mean, eager_mean, exact_mean = (torch.stack([s[0], s[1].sqrt()]) for s in (sums, eager, exact))
        yield Comparison("mean and deviation", mean, eager_mean, exact_mean)


@dataclass(frozen=True, kw_only=True)
class BnStatistics(Case):
    op: ClassVar[Op] = BN_STATISTICS
    shape: tuple[int, int, int, int]
    layout: str = "nchw"
    values: str = "normal"

    def make(self) -> tuple[Any, ...]:
        return (feature_map(self.shape, self.dtype, self.layout, self.values),)

    @classmethod
    def drawn(cls, numbers: random.Random) -> "BnStatistics":
        return cls(**drawn_map(numbers))

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        return compare_sums(outputs[0], arguments[0], Reduce.STATISTICS)


@dataclass(frozen=True, kw_only=True)
class BnApply(Case):
    op: ClassVar[Op] = BN_APPLY
    shape: tuple[int, int, int, int]
    layout: str = "nchw"
    values: str = "normal"
    norm: Norm = SILU
    strided_vectors: bool = False
    reduce: Reduce = Reduce.NONE

    def make(self) -> tuple[Any, ...]:
        x = feature_map(self.shape, self.dtype, self.layout, self.values)
        channels = self.shape[1]
        mean, var, gamma, beta, eps, act = self.norm.make(channels, self.dtype)
        if self.values == "limits":
            # Of var + eps = 1; some releases of PyTorch refuse an eps of 0.
            eps = torch.finfo(torch.float64).tiny
            mean, var, gamma, beta = torch.zeros_like(mean), torch.ones_like(var), None, None
        if self.values == "denormal":
            mean, gamma, beta = torch.zeros_like(mean), gamma * huge(self.dtype), torch.zeros_like(beta)
        if self.strided_vectors:
            mean, var, gamma, beta = torch.stack([mean, var, gamma, beta], 1).unbind(1)
        return x, mean, var, gamma, beta, eps, act, self.reduce

    @classmethod
    def drawn(cls, numbers: random.Random) -> "BnApply":
        norm = Norm(numbers.choice(list(Activation)), affine=numbers.choice((True, False)))
        return cls(norm=norm, reduce=numbers.choice(REDUCTIONS), **drawn_map(numbers))

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        y, sums = outputs
        *given, reduce = arguments
        yield Comparison("y", y, reference.norm_act(*given), reference.norm_act(*as_float64(given)))
        yield from compare_sums(sums, y, reduce)


def image_vectors(shape: Sequence[int], dtype: torch.dtype, given: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """A factor and a summand for each image and channel, [N, C]."""
    if not given:
        return None, None
    wide = torch.promote_types(dtype, torch.float32)
    return torch.rand(shape[:2]).to(wide) + 0.5, torch.randn(shape[:2]).to(wide)


def memory_of(layout: str) -> str:
    """What is dense and laid out as a map of this layout."""
    return layout.split()[-1]


@dataclass(frozen=True, kw_only=True)
class BnPool(Case):
    op: ClassVar[Op] = BN_POOL
    shape: tuple[int, int, int, int]
    layout: str = "nchw"
    norm: Norm = SILU
    slopes: bool = False

    def make(self) -> tuple[Any, ...]:
        x = feature_map(self.shape, self.dtype, self.layout)
        return x, *self.norm.make(self.shape[1], self.dtype), self.slopes

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        yield Comparison("sums", outputs[0], reference.bn_pool(*arguments), reference.bn_pool(*as_float64(arguments)))


@dataclass(frozen=True, kw_only=True)
class BnResidual(Case):
    op: ClassVar[Op] = BN_RESIDUAL
    shape: tuple[int, int, int, int]
    layout: str = "nchw"  # of the residual
    affine: bool = True
    scale: bool = False
    residual: bool = True

    def make(self) -> tuple[Any, ...]:
        x = feature_map(self.shape, self.dtype, memory_of(self.layout))
        *norm, _ = Norm(affine=self.affine).make(self.shape[1], self.dtype)
        residual = feature_map(self.shape, self.dtype, self.layout) if self.residual else None
        return x, *norm, image_vectors(self.shape, self.dtype, self.scale)[0], residual

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        eager, exact = (reference.bn_residual(*a) for a in (arguments, as_float64(arguments)))
        yield Comparison("y", outputs[0], eager, exact)


@dataclass(frozen=True, kw_only=True)
class BnBackwardSums(Case):
    op: ClassVar[Op] = BN_BACKWARD_SUMS
    shape: tuple[int, int, int, int]
    layout: str = "nchw"
    norm: Norm = SILU
    scaled: bool = False

    def make(self) -> tuple[Any, ...]:
        x, grad = (feature_map(self.shape, self.dtype, layout) for layout in (self.layout, memory_of(self.layout)))
        vectors = image_vectors(self.shape, self.dtype, self.scaled)
        return grad, *vectors, x, *self.norm.make(self.shape[1], self.dtype)

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        eager, exact = (reference.bn_backward_sums(*a) for a in (arguments, as_float64(arguments)))
        yield Comparison("sums", outputs[0], eager, exact)


@dataclass(frozen=True, kw_only=True)
class BnBackward(BnBackwardSums):
    op: ClassVar[Op] = BN_BACKWARD
    fixed: bool = False

    def make(self) -> tuple[Any, ...]:
        *given, act = super().make()
        means = None if self.fixed else 0.1 * torch.randn(2, self.shape[1], dtype=statistics_dtype(given[0]))
        return *given, act, means

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        eager, exact = (reference.bn_backward(*a) for a in (arguments, as_float64(arguments)))
        yield Comparison("grad_x", outputs[0], eager, exact)


f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

# Of every op that passes over a map once.
CORE_MAPS: list[dict[str, Any]] = [
    dict(shape=(3, 129, 1, 1)),
    dict(shape=(1, 17, 1, 1), layout="channels_last", dtype=bf16),
    dict(shape=(1, 2, 1, 7), dtype=f16),
    dict(shape=(1, 3, 7, 1), layout="channels_last", dtype=bf16),
    dict(shape=(2, 1, 13, 15), layout="channels_last"),
    dict(shape=(2, 17, 13, 15), dtype=bf16),
    dict(shape=(2, 129, 5, 6), layout="channels_last", dtype=f16),
    dict(shape=(2, 144, 13, 15), layout="channels_last", dtype=f16),
    dict(shape=(1, 600, 3, 2), layout="channels_last"),
    dict(shape=(2, 16, 16, 16), dtype=f16),
    dict(shape=(2, 24, 14, 14), layout="channels_last", dtype=bf16),
    dict(shape=(1, 8, 30, 32)),
    dict(shape=(2, 3, 5, 7), layout="sliced nchw"),
    dict(shape=(2, 17, 3, 7), layout="sliced channels_last", dtype=f16),
    dict(shape=(0, 3, 6, 7)),
    dict(shape=(0, 3, 6, 7), layout="channels_last", dtype=f16),
]
CUT_MAPS = [
    dict(shape=(2, 24, 6, 10), layout=f"{cut} {memory}", dtype=dtype)
    for cut in CUTS
    for memory in ("nchw", "channels_last")
    for dtype in (f32, f16)
]
LARGE_MAPS = [
    dict(shape=(1, 8, 60, 64), layout=layout, dtype=dtype) for layout in ("nchw", "channels_last") for dtype in DTYPES
]


def _cases() -> Iterator[Case]:
    numbers = random.Random(0)
    for m in CORE_MAPS:
        yield BnStatistics(tag="core", **m)
        yield BnApply(tag="core", reduce=Reduce.MEAN, **m)
        yield BnPool(tag="core", slopes=True, **m)
        yield BnResidual(tag="core", scale=True, **m)
        yield BnBackwardSums(tag="core", scaled=True, **m)
        yield BnBackward(tag="core", scaled=True, **m)
    for layout in ("nchw", "channels_last"):
        yield BnStatistics(tag="core", shape=(3, 5, 13, 15), layout=layout, values="offset")
        yield BnApply(tag="core", shape=(1, 17, 3, 4), layout=layout, strided_vectors=True)
        yield BnApply(tag="core", shape=(2, 8, 5, 8), layout=layout, norm=Norm(Activation.SILU, affine=False))
        yield BnStatistics(shape=(3, 20, 40, 33), layout=layout, values="offset")
        yield BnStatistics(shape=(3, 20, 13, 15), layout=layout, values="offset", dtype=f64)
        for vectors in ("narrow", "mixed"):
            yield BnApply(
                tag="core", shape=(2, 16, 9, 9), layout=layout, dtype=f16, norm=Norm(Activation.SILU, vectors=vectors)
            )
        for dtype in DTYPES:
            yield BnApply(shape=(2, 9, 6, 7), layout=layout, dtype=dtype, values="denormal", norm=Norm())
            yield BnApply(shape=(2, 9, 6, 7), layout=layout, dtype=dtype, values="nonfinite")
    for act in Activation:
        # Where vectors are whole, and where they are not.
        yield BnApply(tag="core", shape=(2, 3, 5, 7), values="limits", norm=Norm(act))
        for dtype in DTYPES:
            layout = numbers.choice(("nchw", "channels_last"))
            yield BnApply(shape=(2, 16, 5, 8), layout=layout, dtype=dtype, values="limits", norm=Norm(act))
    for m in (*maps(numbers), *CUT_MAPS, *LARGE_MAPS):
        yield BnStatistics(**m)
        yield BnApply(norm=Norm(numbers.choice(list(Activation))), reduce=numbers.choice(REDUCTIONS), **m)
        yield BnPool(norm=Norm(numbers.choice(SMOOTH), affine=False), slopes=numbers.choice((False, True)), **m)
        yield BnResidual(affine=False, residual=numbers.choice((False, True)), **m)
        yield BnBackwardSums(norm=Norm(numbers.choice(SMOOTH)), **m)
        yield BnBackward(norm=Norm(numbers.choice(SMOOTH), affine=False), fixed=numbers.choice((False, True)), **m)


CASES = list(_cases())
