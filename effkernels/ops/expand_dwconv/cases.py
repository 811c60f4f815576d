"""Cases of `expand_dwconv` and of its backward."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import Activation
from effkernels.ops._cases import (
    CUTS,
    DTYPES,
    Case,
    Comparison,
    Norm,
    as_float64,
    drawn_map,
    drawn_norm,
    feature_map,
)
from effkernels.ops._geometry import resolve_padding
from effkernels.ops._op import Op
from effkernels.ops._precision import rounded_to_tf32
from effkernels.ops.batch_norm.cases import SMOOTH, compare_sums
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv import KERNEL_SIZES, STRIDES
from effkernels.ops.dwconv.cases import DwconvBackward
from effkernels.ops.expand_dwconv import reference
from effkernels.ops.expand_dwconv.op import EXPAND_DWCONV, EXPAND_DWCONV_BACKWARD, EXPAND_DWCONV_GRADIENTS

SILU, HARDSWISH, NOTHING = Norm(Activation.SILU), Norm(Activation.HARDSWISH), Norm(statistics=False)


@dataclass(frozen=True, kw_only=True)
class ExpandDwconv(Case):
    op: ClassVar[Op] = EXPAND_DWCONV
    shape: tuple[int, int, int, int]
    hidden: int
    layout: str = "channels_last"
    values: str = "normal"
    kernel_size: int = 3
    stride: int = 1
    padding: int | str = "auto"
    norm1: Norm = SILU
    norm2: Norm = SILU
    reduce: Reduce = Reduce.MEAN

    def make(self) -> tuple[Any, ...]:
        _, channels, height, width = self.shape
        k = self.kernel_size
        x = feature_map(self.shape, self.dtype, self.layout, self.values)
        expand = (torch.randn(self.hidden, channels) / channels**0.5).to(self.dtype)
        depthwise = torch.randn(self.hidden, 1, k, k).to(self.dtype)
        top, out_h = resolve_padding("expand_dwconv", self.padding, height, k, self.stride)
        left, out_w = resolve_padding("expand_dwconv", self.padding, width, k, self.stride)
        norms = [norm.make(self.hidden, self.dtype) for norm in (self.norm1, self.norm2)]
        return x, expand, *norms[0], depthwise, *norms[1], self.stride, top, left, out_h, out_w, self.reduce

    @classmethod
    def drawn(cls, numbers: random.Random) -> "ExpandDwconv":
        of_map, k = drawn_map(numbers), numbers.choice(KERNEL_SIZES)
        least = max(-(-(k - size) // 2) for size in (*of_map["shape"][2:], k))
        return cls(
            **of_map, hidden=numbers.randint(1, 100), kernel_size=k, stride=numbers.choice(STRIDES),
            padding=numbers.choice(("auto", "same", numbers.randint(least, least + 4))),
            norm1=drawn_norm(numbers), norm2=drawn_norm(numbers), reduce=numbers.choice(list(Reduce)),
        )  # fmt: skip

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        d, sums = outputs
        *given, reduce = arguments
        exact = reference.expand_dwconv(*as_float64(given))
        if self.tf32:
            x, expand, *rest = given
            given = [rounded_to_tf32(x), rounded_to_tf32(expand), *rest]
        yield Comparison("d", d, reference.expand_dwconv(*given), exact)
        yield from compare_sums(sums, d, reduce)


@dataclass(frozen=True, kw_only=True)
class ExpandDwconvBackward(DwconvBackward):
    op: ClassVar[Op] = EXPAND_DWCONV_BACKWARD
    hidden: int
    layout: str = "channels_last"
    prologue: Norm = SILU
    scaled: bool = True

    @property
    def channels(self) -> int:
        return self.hidden

    def make(self) -> tuple[Any, ...]:
        given = super().make()
        channels = self.shape[1]
        expand = (torch.randn(self.hidden, channels) / channels**0.5).to(self.dtype)
        return *given[:13], expand, *given[13:]

    @staticmethod
    def of_dwconv_backward(arguments: Sequence[Any]) -> Sequence[Any]:
        *before, x, expand = arguments[:14]
        return *before, F.conv2d(x, expand[:, :, None, None]), *arguments[14:]


@dataclass(frozen=True, kw_only=True)
class ExpandDwconvGradients(ExpandDwconvBackward):
    op: ClassVar[Op] = EXPAND_DWCONV_GRADIENTS
    centred: bool = True
    needs: tuple[bool, ...] = (True, True, True, True)  # type: ignore[assignment]

    def make(self) -> tuple[Any, ...]:
        given = super().make()
        wide = torch.promote_types(self.dtype, f32)
        return *given[:14], torch.randn(self.shape[1], dtype=wide) if self.centred else None, *given[14:]

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        eager, exact = (reference.expand_dwconv_gradients(*a) for a in (arguments, as_float64(arguments)))
        names = ("sums", "grad_x", "grad_expand", "grad_weight")
        found = dict(zip((*names[1:], names[0]), zip(outputs, eager, exact, strict=True), strict=True))
        for name, needed in zip(names, self.needs, strict=True):
            if needed:
                yield Comparison(name, *found[name])


f32, f16, bf16 = DTYPES
f64 = torch.float64

CORE: list[dict[str, Any]] = [
    # One pixel, row, column, channel.
    dict(shape=(3, 2, 1, 1), hidden=3),
    dict(shape=(1, 1, 1, 7), hidden=1, dtype=f16, stride=2, padding="same"),
    dict(shape=(2, 3, 7, 1), hidden=20, dtype=bf16, kernel_size=5),
    # As a network calls it; several tiles, groups of channels, and the last ones hanging over.
    dict(shape=(1, 24, 15, 17), hidden=72, dtype=f16),
    dict(shape=(2, 16, 14, 14), hidden=96, dtype=bf16, stride=2, padding="same"),
    dict(shape=(1, 40, 7, 9), hidden=120, dtype=f16, kernel_size=5),
    dict(shape=(1, 80, 14, 14), hidden=56, dtype=f16, kernel_size=5, reduce=Reduce.NONE),
    dict(shape=(1, 192, 7, 7), hidden=64, dtype=f16, kernel_size=5),
    dict(shape=(1, 12, 30, 33), hidden=20, kernel_size=5, stride=2),
    # In training d is stored raw, and its statistics with it, a large mean or not.
    dict(shape=(2, 24, 15, 17), hidden=72, dtype=f16, norm2=NOTHING, reduce=Reduce.STATISTICS),
    dict(shape=(2, 16, 13, 9), hidden=40, dtype=bf16, kernel_size=5, stride=2, norm2=NOTHING, reduce=Reduce.STATISTICS),
    dict(
        shape=(3, 5, 17, 19), hidden=18, values="offset", padding=0, norm1=NOTHING, norm2=NOTHING,
        reduce=Reduce.STATISTICS,
    ),
    dict(shape=(0, 8, 6, 7), hidden=16, dtype=f16, norm2=NOTHING, reduce=Reduce.STATISTICS),
    # Around the map are zeros, not the activation of what bn1 makes of zero; padding may exceed the window.
    dict(shape=(1, 8, 4, 5), hidden=24, dtype=f16, padding=4, norm2=HARDSWISH),
    dict(shape=(2, 8, 9, 8), hidden=24, dtype=f16, kernel_size=5, stride=2, padding=0, norm1=HARDSWISH),
    # Other layouts, channels that are no whole vectors, NaN, nothing.
    dict(shape=(2, 24, 6, 7), hidden=40, dtype=f16, layout="nchw"),
    dict(shape=(2, 17, 6, 7), hidden=35, layout="nchw"),
    dict(shape=(2, 17, 6, 7), hidden=50, dtype=f16, layout="sliced channels_last"),
    dict(shape=(1, 24, 6, 7), hidden=16, dtype=bf16, values="nonfinite"),
    dict(shape=(0, 8, 6, 7), hidden=16, dtype=f16),
    # In TF32.
    dict(shape=(1, 24, 15, 17), hidden=72, tf32=True),
    dict(shape=(2, 17, 9, 8), hidden=50, layout="nchw", kernel_size=5, stride=2, tf32=True),
    dict(shape=(1, 12, 6, 7), hidden=16, values="nonfinite", tf32=True),
]  # fmt: skip
CORE_BACKWARD: list[dict[str, Any]] = [
    dict(shape=(3, 2, 1, 1), hidden=3),
    dict(shape=(2, 3, 7, 1), hidden=20, dtype=bf16, kernel_size=5, scaled=False, fixed=True),
    # As a network calls it; several tiles, groups of channels, and the last ones hanging over.
    dict(shape=(1, 24, 15, 17), hidden=72, dtype=f16),
    dict(shape=(2, 16, 14, 14), hidden=96, dtype=bf16, stride=2, padding="same"),
    dict(shape=(1, 40, 7, 9), hidden=120, dtype=f16, kernel_size=5),
    dict(shape=(1, 12, 30, 33), hidden=20, kernel_size=5, stride=2),
    dict(shape=(1, 8, 9, 10), hidden=24, dtype=f16, kernel_size=7, prologue=HARDSWISH),
    # Channels that are no whole vectors, one gradient only, slices, nothing.
    dict(shape=(2, 17, 6, 7), hidden=35, stride=2, padding="same", needs=(True, False)),
    dict(shape=(2, 17, 6, 7), hidden=50, dtype=f16, layout="sliced channels_last", needs=(False, True)),
    dict(shape=(0, 8, 6, 7), hidden=16, dtype=f16),
]


def _cases() -> Iterator[Case]:
    numbers = random.Random(0)
    for core in CORE:
        yield ExpandDwconv(tag="core", **core)
    windows = [*itertools.product(KERNEL_SIZES, STRIDES)]
    for (k, stride), dtype in itertools.product(windows, DTYPES):
        yield ExpandDwconv(
            tag="instance", shape=(1, 24, 16, 18), hidden=48, dtype=dtype, kernel_size=k, stride=stride, padding="same"
        )
    for backward in CORE_BACKWARD:
        yield ExpandDwconvBackward(tag="core", **backward)
        yield ExpandDwconvGradients(tag="core", **{k: v for k, v in backward.items() if k != "needs"})
    for needed in range(4):
        needs = tuple(i == needed for i in range(4))
        yield ExpandDwconvGradients(shape=(2, 17, 6, 7), hidden=35, needs=needs, centred=needed % 2 == 0)
    yield ExpandDwconvGradients(shape=(2, 70, 9, 60), hidden=150)  # several panels, chunks and groups of rows
    for (k, stride), dtype in itertools.product(windows, (*DTYPES, f64)):
        for kind in (ExpandDwconvBackward, ExpandDwconvGradients):
            yield kind(
                tag="instance", shape=(2, 16, 8, 9), hidden=16, dtype=dtype, kernel_size=k, stride=stride,
                padding="same",
            )  # fmt: skip
            yield kind(
                shape=(1, 18, 40, 33), hidden=70, dtype=dtype, kernel_size=k, stride=stride,
                padding=numbers.choice((0, 1, 4)), epilogue=Norm(numbers.choice(SMOOTH)),
                prologue=Norm(numbers.choice(SMOOTH)),
            )  # fmt: skip
    for cut, memory, dtype in itertools.product(CUTS, ("nchw", "channels_last"), (f32, f16)):
        k, stride = numbers.choice(windows)
        for kind in (ExpandDwconvBackward, ExpandDwconvGradients):
            yield kind(
                shape=(2, 24, 6, 10), hidden=33, layout=f"{cut} {memory}", dtype=dtype, kernel_size=k, stride=stride
            )
        yield ExpandDwconv(
            shape=(2, 24, 6, 10), hidden=33, layout=f"{cut} {memory}", dtype=dtype, kernel_size=k, stride=stride,
            norm1=drawn_norm(numbers), norm2=drawn_norm(numbers), reduce=numbers.choice(list(Reduce)),
        )  # fmt: skip
    paddings: tuple[int | str, ...] = (0, 1, 4, "same")
    for (k, stride), padding in itertools.product(windows, paddings):
        yield ExpandDwconv(
            shape=(2, 18, 20, 19), hidden=50, dtype=numbers.choice(DTYPES), kernel_size=k, stride=stride,
            padding=padding, norm1=drawn_norm(numbers), norm2=drawn_norm(numbers),
        )  # fmt: skip


CASES = list(_cases())
