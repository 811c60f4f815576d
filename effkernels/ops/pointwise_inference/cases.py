"""Cases of `pointwise_inference`."""

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
    maps,
)
from effkernels.ops._op import Op
from effkernels.ops._precision import rounded_to_tf32
from effkernels.ops.batch_norm.cases import image_vectors, memory_of
from effkernels.ops.pointwise_inference import reference
from effkernels.ops.pointwise_inference.op import POINTWISE_INFERENCE

NORM, SILU = Norm(), Norm(Activation.SILU)


@dataclass(frozen=True, kw_only=True)
class PointwiseInference(Case):
    op: ClassVar[Op] = POINTWISE_INFERENCE
    shape: tuple[int, int, int, int]
    outputs: int
    layout: str = "nchw"
    values: str = "normal"
    norm: Norm = NORM
    gated: bool = True
    residual: bool = False
    residual_layout: str = ""

    def make(self) -> tuple[Any, ...]:
        n, channels, *size = self.shape
        x = feature_map(self.shape, self.dtype, self.layout, self.values)
        weight = (torch.randn(self.outputs, channels) / channels**0.5).to(self.dtype)
        gate, _ = image_vectors(self.shape, self.dtype, self.gated)
        layout = self.residual_layout or memory_of(self.layout)
        residual = feature_map((n, self.outputs, *size), self.dtype, layout) if self.residual else None
        return x, weight, *self.norm.make(self.outputs, self.dtype), gate, residual

    @classmethod
    def drawn(cls, numbers: random.Random) -> "PointwiseInference":
        return cls(
            **drawn_map(numbers), outputs=numbers.randint(1, 140), norm=drawn_norm(numbers),
            gated=numbers.choice((True, False)), residual=numbers.choice((True, False)),
        )  # fmt: skip

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        exact = reference.pointwise_inference(*as_float64(arguments))
        if self.tf32:
            x, weight, *norm, gate, residual = arguments
            gated = x if gate is None else x * gate[:, :, None, None]
            arguments = (rounded_to_tf32(gated), rounded_to_tf32(weight), *norm, None, residual)
        yield Comparison("y", outputs[0], reference.pointwise_inference(*arguments), exact)


f32, f16, bf16 = DTYPES

CORE: list[dict[str, Any]] = [
    # One pixel, row, column, channel; a map of several tiles, the last one nearly empty.
    dict(shape=(3, 2, 1, 1), outputs=3),
    dict(shape=(1, 1, 1, 7), outputs=1, layout="channels_last", dtype=f16),
    dict(shape=(2, 40, 10, 13), outputs=24, layout="channels_last", dtype=f16, residual=True),
    # Depths of less than a chunk, of whole chunks and a part of one.
    dict(shape=(2, 8, 7, 7), outputs=16, layout="channels_last", dtype=bf16, norm=SILU, gated=False),
    dict(shape=(1, 96, 7, 7), outputs=80, layout="channels_last", dtype=f16, residual=True),
    dict(shape=(1, 72, 5, 6), outputs=136, layout="channels_last"),
    # Channels that are no whole vectors; layouts that differ.
    dict(shape=(2, 17, 6, 7), outputs=20, layout="channels_last", dtype=f16, residual=True),
    dict(shape=(2, 24, 6, 7), outputs=13, dtype=bf16, residual=True, norm=SILU),
    dict(shape=(2, 35, 9, 9), outputs=40, residual=True),
    dict(shape=(2, 24, 6, 7), outputs=40, layout="channels_last", dtype=f16, residual=True, residual_layout="nchw"),
    dict(shape=(2, 24, 6, 7), outputs=16, layout="sliced channels_last", dtype=f16, gated=False),
    dict(shape=(2, 24, 6, 7), outputs=16, layout="aligned channels_last", dtype=f16),
    dict(shape=(0, 8, 6, 7), outputs=8, layout="channels_last"),
    # In TF32.
    dict(shape=(1, 72, 5, 6), outputs=136, layout="channels_last", tf32=True),
    dict(shape=(2, 35, 9, 9), outputs=40, residual=True, tf32=True, values="nonfinite"),
    dict(shape=(1, 24, 6, 7), outputs=16, layout="channels_last", dtype=f16, values="nonfinite", norm=SILU),
]


def _cases() -> Iterator[Case]:
    numbers = random.Random(0)
    for core in CORE:
        yield PointwiseInference(tag="core", **core)
    # Each tile: wide maps, and small ones of many channels, are cut into enough larger ones.
    tiles = (((1, 96, 7, 7), 24), ((1, 8, 144, 146), 56), ((48, 8, 7, 7), 320))
    for (shape, outputs), (dtype, tf32) in itertools.product(tiles, ((f32, True), *((t, False) for t in DTYPES))):
        yield PointwiseInference(
            tag="instance", shape=shape, outputs=outputs, layout="channels_last", dtype=dtype, residual=True,
            tf32=tf32,
        )  # fmt: skip
    for m in maps(numbers):
        yield PointwiseInference(
            **m, outputs=numbers.choice((1, 16, 50)), norm=drawn_norm(numbers), gated=numbers.choice((True, False)),
            residual=numbers.choice((True, False)),
        )  # fmt: skip
    for cut, memory, dtype in itertools.product(CUTS, ("nchw", "channels_last"), (f32, f16)):
        layout = f"{cut} {memory}"
        yield PointwiseInference(
            shape=(2, 24, 6, 10), outputs=16, layout=layout, dtype=dtype, residual=True, residual_layout=layout
        )


CASES = list(_cases())
