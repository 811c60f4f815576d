"""Cases of `dwconv` and `dwconv_backward`."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
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
    huge,
    maps,
)
from effkernels.ops._geometry import resolve_padding
from effkernels.ops._op import Op
from effkernels.ops.batch_norm.cases import SMOOTH, compare_sums, image_vectors, memory_of
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.batch_norm.reference import normalized
from effkernels.ops.dwconv import KERNEL_SIZES, STRIDES, reference
from effkernels.ops.dwconv.op import DWCONV, DWCONV_BACKWARD

NOTHING = Norm(statistics=False)
SILU, RELU, HARDSWISH = Norm(Activation.SILU), Norm(Activation.RELU), Norm(Activation.HARDSWISH)


@dataclass(frozen=True, kw_only=True)
class Dwconv(Case):
    op: ClassVar[Op] = DWCONV
    shape: tuple[int, int, int, int]
    layout: str = "nchw"
    values: str = "normal"
    kernel_size: int = 3
    stride: int = 1
    padding: int | str = "auto"
    prologue: Norm = NOTHING
    epilogue: Norm = NOTHING
    reduce: Reduce = Reduce.NONE
    strided_weight: bool = False

    def make(self) -> tuple[Any, ...]:
        _, channels, height, width = self.shape
        k = self.kernel_size
        x = feature_map(self.shape, self.dtype, self.layout, self.values)
        weight = torch.randn(channels, 1, k, k)
        if self.values == "denormal":
            weight *= huge(self.dtype)
        if self.values == "offset":  # the statistics of y are then those of x
            weight.zero_()[:, :, k // 2, k // 2] = 1
        if self.strided_weight:
            weight = weight.transpose(0, 3).contiguous().transpose(0, 3)
        top, out_h = resolve_padding("dwconv", self.padding, height, k, self.stride)
        left, out_w = resolve_padding("dwconv", self.padding, width, k, self.stride)
        norms = self.prologue.make(channels, self.dtype) + self.epilogue.make(channels, self.dtype)
        return x, weight.to(self.dtype), *norms, self.stride, top, left, out_h, out_w, self.reduce

    @classmethod
    def drawn(cls, numbers: random.Random) -> "Dwconv":
        of_map, k = drawn_map(numbers), numbers.choice(KERNEL_SIZES)
        least = max(-(-(k - size) // 2) for size in (*of_map["shape"][2:], k))
        padding = numbers.choice(("auto", "same", numbers.randint(least, least + 4)))
        return cls(**of_map, kernel_size=k, stride=numbers.choice(STRIDES), padding=padding, **_around(numbers))

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        y, sums = outputs
        *given, reduce = arguments
        yield Comparison("y", y, reference.dwconv(*given), reference.dwconv(*as_float64(given)))
        yield from compare_sums(sums, y, reduce)


def _around(numbers: random.Random) -> dict[str, Any]:
    norms = drawn_norm(numbers), drawn_norm(numbers)
    return dict(prologue=norms[0], epilogue=norms[1], reduce=numbers.choice(list(Reduce)))


@dataclass(frozen=True, kw_only=True)
class DwconvBackward(Case):
    op: ClassVar[Op] = DWCONV_BACKWARD
    shape: tuple[int, int, int, int]
    layout: str = "nchw"
    kernel_size: int = 3
    stride: int = 1
    padding: int | str = "auto"
    prologue: Norm = NOTHING
    epilogue: Norm = SILU
    scaled: bool = False
    fixed: bool = False
    needs: tuple[bool, bool] = (True, True)
    grad_layout: str = ""  # by default dense, and as x

    @property
    def channels(self) -> int:
        return self.shape[1]

    def make(self) -> tuple[Any, ...]:
        n, _, height, width = self.shape
        channels, k = self.channels, self.kernel_size
        top, out_h = resolve_padding("dwconv", self.padding, height, k, self.stride)
        left, out_w = resolve_padding("dwconv", self.padding, width, k, self.stride)
        out = (n, channels, out_h, out_w)
        x, weight = feature_map(self.shape, self.dtype, self.layout), torch.randn(channels, 1, k, k).to(self.dtype)
        memory = memory_of(self.layout)
        grad, y = (feature_map(out, self.dtype, layout) for layout in (self.grad_layout or memory, memory))
        means = None if self.fixed else 0.2 * torch.randn(2, channels).to(torch.promote_types(self.dtype, f32))
        norms = (self.epilogue.make(channels, self.dtype), self.prologue.make(channels, self.dtype))
        vectors = image_vectors(out, self.dtype, self.scaled)
        return grad, *vectors, y, *norms[0], means, weight, x, *norms[1], self.stride, top, left, *self.needs

    @staticmethod
    def of_dwconv_backward(arguments: Sequence[Any]) -> Sequence[Any]:
        """What `dwconv_backward` would be given."""
        return arguments

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        runs = [self.of_dwconv_backward(a) for a in (arguments, as_float64(arguments))]
        eager, exact = (reference.dwconv_backward(*run) for run in runs)
        for i, name in enumerate(("grad_norm", "grad_weight")):
            if self.needs[i]:
                yield Comparison(name, outputs[i], eager[i], exact[i])
        if outputs[2].numel() == 0:
            return
        sums = []
        for dtype in (outputs[2].dtype, f64):
            wide = self.of_dwconv_backward([a.to(dtype) if isinstance(a, Tensor) else a for a in arguments])
            x, mean, var, eps = (wide[i] for i in (12, 13, 14, 17))
            dz = outputs[0].to(dtype)
            sums.append(torch.stack([dz.sum((0, 2, 3)), (dz * normalized(x, mean, var, eps)).sum((0, 2, 3))]))
        yield Comparison("sums", outputs[2], *sums)


f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
MEAN, STATISTICS = Reduce.MEAN, Reduce.STATISTICS

CORE: list[dict[str, Any]] = [
    # One pixel, row, column, channel.
    dict(shape=(3, 2, 1, 1), reduce=MEAN),
    dict(shape=(1, 129, 1, 1), dtype=f16, kernel_size=5, padding="same", reduce=STATISTICS),
    dict(shape=(3, 129, 1, 1), epilogue=SILU, reduce=MEAN),
    dict(shape=(1, 3, 1, 7), layout="channels_last", dtype=bf16, stride=2, padding="same", reduce=MEAN),
    dict(shape=(2, 3, 7, 1), kernel_size=5, stride=2, reduce=STATISTICS),
    dict(shape=(1, 1, 13, 15), layout="channels_last", dtype=f16, padding=1, reduce=STATISTICS),
    # Several blocks of channels, bands of rows, blocks of columns; columns beyond a warp.
    dict(shape=(1, 129, 5, 6), layout="channels_last", dtype=f16, reduce=MEAN),
    dict(shape=(1, 17, 5, 6), dtype=bf16, reduce=STATISTICS),
    dict(shape=(1, 17, 13, 15), layout="channels_last", reduce=STATISTICS),
    dict(shape=(1, 3, 13, 15), dtype=f16, stride=2, padding="same", reduce=MEAN),
    dict(shape=(1, 2, 3, 37), layout="channels_last", kernel_size=5, reduce=MEAN),
    dict(shape=(1, 2, 3, 140), reduce=STATISTICS),
    dict(shape=(1, 2, 7, 150), dtype=f16, kernel_size=7, stride=2, padding="same", prologue=SILU, reduce=STATISTICS),
    # As a network calls it.
    dict(
        shape=(1, 96, 13, 15), layout="channels_last", dtype=f16, stride=2, padding="same", epilogue=SILU, reduce=MEAN
    ),
    dict(shape=(2, 5, 9, 11), dtype=f16, kernel_size=5, epilogue=SILU, reduce=MEAN),
    dict(
        shape=(2, 24, 7, 9), layout="channels_last", dtype=bf16, kernel_size=5, prologue=SILU, reduce=STATISTICS
    ),
    dict(shape=(3, 3, 13, 15), prologue=SILU, reduce=STATISTICS),
    # Padding is zero after the prologue, whose value at zero is not; it may exceed the window.
    dict(shape=(2, 17, 6, 7), layout="channels_last", prologue=SILU, epilogue=HARDSWISH, reduce=STATISTICS),
    dict(shape=(2, 17, 6, 7), dtype=f16, stride=2, prologue=SILU, epilogue=HARDSWISH, reduce=STATISTICS),
    dict(shape=(1, 17, 9, 8), layout="channels_last", kernel_size=5, padding=0),
    dict(shape=(1, 3, 4, 5), dtype=f16, stride=2, padding=4, prologue=SILU, reduce=MEAN),
    dict(shape=(1, 8, 4, 5), layout="channels_last", padding=4, prologue=SILU, reduce=MEAN),
    dict(shape=(2, 3, 13, 14), layout="channels_last", dtype=bf16, kernel_size=5, stride=2, padding="same"),
    dict(shape=(1, 3, 13, 15), kernel_size=7, reduce=MEAN),
    dict(shape=(1, 17, 13, 15), layout="channels_last", dtype=f16, kernel_size=7, stride=2, padding="same"),
    dict(
        shape=(1, 3, 6, 7), kernel_size=5,
        prologue=Norm(Activation.RELU6, statistics=False), epilogue=Norm(Activation.SILU, statistics=False),
    ),
    # Slices, strides, NaN, a large mean.
    dict(shape=(2, 3, 6, 7), layout="sliced nchw", reduce=MEAN),
    dict(shape=(2, 17, 6, 7), layout="sliced channels_last", dtype=f16, kernel_size=5, stride=2, padding="same"),
    dict(shape=(1, 3, 6, 7), strided_weight=True),
    dict(shape=(1, 3, 6, 7), values="nonfinite", epilogue=RELU),
    dict(shape=(3, 5, 13, 15), values="offset", reduce=STATISTICS),
    dict(shape=(3, 5, 13, 15), layout="channels_last", values="offset", reduce=STATISTICS),
    dict(shape=(0, 3, 6, 7), layout="channels_last", epilogue=SILU, reduce=MEAN),
    dict(shape=(0, 3, 9, 11), dtype=f16, epilogue=SILU, reduce=STATISTICS),
]  # fmt: skip


def _cases() -> Iterator[Case]:
    numbers = random.Random(0)
    windows = [*itertools.product(KERNEL_SIZES, STRIDES)]
    for core in CORE:
        yield Dwconv(tag="core", **core)
    # One tile that hangs over, and an empty batch.
    for i, ((k, stride), layout) in enumerate(itertools.product(windows, ("nchw", "channels_last"))):
        yield DwconvBackward(
            tag="core", shape=(2, 5, 6, 7), layout=layout, dtype=DTYPES[i % 3], kernel_size=k, stride=stride,
            padding="same", prologue=SILU, scaled=True,
        )  # fmt: skip
    yield DwconvBackward(tag="core", shape=(1, 17, 9, 3), layout="sliced channels_last", fixed=True)
    yield DwconvBackward(tag="core", shape=(0, 3, 6, 7), prologue=SILU)
    # A gradient laid out otherwise than x, and that of a mean over the map.
    yield DwconvBackward(tag="core", shape=(2, 5, 6, 7), grad_layout="channels_last")
    yield DwconvBackward(tag="core", shape=(2, 5, 6, 7), layout="channels_last", grad_layout="expanded nchw")
    for (k, stride), layout in itertools.product(windows, ("nchw", "channels_last")):
        for shape, needs, padding in (
            ((2, 24, 16, 19), (True, True), "auto"),
            ((3, 17, 9, 8), (True, False), "same"),
            ((1, 5, 7, 7), (False, True), 4),
        ):
            yield DwconvBackward(
                shape=shape, layout=layout, dtype=numbers.choice(DTYPES), kernel_size=k, stride=stride,
                padding=padding, prologue=SILU, scaled=True, needs=needs,
            )  # fmt: skip
    for (k, stride), layout, dtype in itertools.product(windows, ("nchw", "channels_last"), DTYPES):
        # Whole vectors and several tiles; then scalar accesses and tiles that hang over.
        for shape, reduce, prologue in (((1, 24, 16, 40), MEAN, HARDSWISH), ((3, 17, 13, 15), STATISTICS, SILU)):
            yield Dwconv(
                tag="instance", shape=shape, layout=layout, dtype=dtype, kernel_size=k, stride=stride,
                prologue=prologue, epilogue=SILU, reduce=reduce,
            )  # fmt: skip
        # Several blocks, whose sums are added up.
        yield DwconvBackward(
            tag="instance", shape=(3, 8, 16, 24), layout=layout, dtype=dtype, kernel_size=k, stride=stride,
            prologue=SILU, scaled=True,
        )  # fmt: skip
    for m in maps(numbers):
        k, stride = numbers.choice(windows)
        yield DwconvBackward(
            **m, kernel_size=k, stride=stride, padding=numbers.choice(("auto", "same")),
            epilogue=Norm(numbers.choice(SMOOTH)), prologue=numbers.choice((NOTHING, SILU, HARDSWISH)),
            fixed=numbers.choice((False, True)),
        )  # fmt: skip
        for k, stride in numbers.sample(windows, 2):
            yield Dwconv(
                **m, kernel_size=k, stride=stride, **_around(numbers), padding=numbers.choice(("auto", "same"))
            )
    for layout, (k, stride) in itertools.product(("nchw", "channels_last"), windows):
        for padding in (0, 1, 4, "same"):
            yield Dwconv(
                shape=(2, 18, 10, 9), layout=layout, padding=padding, kernel_size=k, stride=stride, **_around(numbers)
            )
    for cut, memory, dtype in itertools.product(CUTS, ("nchw", "channels_last"), (f32, f16)):
        k, stride = numbers.choice(windows)
        yield Dwconv(
            shape=(2, 24, 6, 10),
            layout=f"{cut} {memory}",
            dtype=dtype,
            kernel_size=k,
            stride=stride,
            **_around(numbers),
        )
        yield DwconvBackward(shape=(2, 24, 6, 10), layout=f"{cut} {memory}", dtype=dtype, kernel_size=k, stride=stride)
    for layout, dtype in itertools.product(("nchw", "channels_last"), DTYPES):
        yield Dwconv(shape=(2, 18, 6, 7), layout=layout, dtype=dtype, values="nonfinite", epilogue=RELU)
        yield Dwconv(shape=(2, 18, 6, 7), layout=layout, dtype=dtype, values="denormal")
    for layout, (k, stride) in itertools.product(("nchw", "channels_last"), windows):
        yield Dwconv(shape=(1, 70, 61, 150), layout=layout, kernel_size=k, stride=stride, **_around(numbers))
        yield DwconvBackward(shape=(1, 70, 61, 50), layout=layout, kernel_size=k, stride=stride, prologue=SILU)
        yield Dwconv(shape=(2, 9, 40, 33), layout=layout, kernel_size=k, values="offset", reduce=STATISTICS)


CASES = list(_cases())
