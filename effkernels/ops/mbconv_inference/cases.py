"""Cases of `mbconv_inference`."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from effkernels.ops._activation import Activation
from effkernels.ops._cases import DTYPES, Case, Comparison, Norm, as_float64, feature_map
from effkernels.ops._geometry import resolve_padding
from effkernels.ops._op import Op
from effkernels.ops.dwconv import reference as dwconv
from effkernels.ops.dwconv.op import NO_NORM
from effkernels.ops.expand_dwconv.reference import expand_dwconv
from effkernels.ops.mbconv_inference.op import MBCONV_INFERENCE
from effkernels.ops.pointwise_inference.reference import pointwise_inference
from effkernels.ops.squeeze_excite.reference import gate_of


@dataclass(frozen=True, kw_only=True)
class MbconvInference(Case):
    """`ratio` 0: no expand convolution; `squeezed` 0: no gate."""

    op: ClassVar[Op] = MBCONV_INFERENCE
    shape: tuple[int, int, int, int]
    ratio: int = 6
    kernel_size: int = 3
    stride: int = 1
    padding: int | str = "auto"
    outputs: int
    squeezed: int = 4
    layout: str = "channels_last"
    residual: bool = False
    act: Activation = Activation.SILU
    wide_gate: bool = False

    def make(self) -> tuple[Any, ...]:
        _, channels, height, width = self.shape
        hidden, k, r = channels * (self.ratio or 1), self.kernel_size, self.squeezed

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5

        x = feature_map(self.shape, self.dtype, self.layout)
        expand = (weight(hidden, channels, 1, 1).to(self.dtype), *Norm(self.act).make(hidden, self.dtype))
        depthwise = (weight(hidden, 1, k, k).to(self.dtype), *Norm(self.act).make(hidden, self.dtype))
        gate_dtype = torch.promote_types(self.dtype, torch.float32) if self.wide_gate else self.dtype
        gate = (weight(r or 1, hidden, 1, 1), torch.randn(r), weight(hidden, r or 1, 1, 1), torch.randn(hidden))
        project = (weight(self.outputs, hidden, 1, 1).to(self.dtype), *Norm().make(self.outputs, self.dtype)[:-1])
        top, out_h = resolve_padding("mbconv_inference", self.padding, height, k, self.stride)
        left, out_w = resolve_padding("mbconv_inference", self.padding, width, k, self.stride)
        return (
            x, *(expand if self.ratio else (None, *NO_NORM)), *depthwise,
            *((None,) * 4 if r == 0 else (t.to(gate_dtype) for t in gate)), Activation.SILU, Activation.SIGMOID,
            *project, self.stride, top, left, out_h, out_w, self.residual,
        )  # fmt: skip

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        yield Comparison("y", outputs[0], _reference(*arguments), _reference(*as_float64(arguments)))


def _reference(x: Tensor, *arguments: Any) -> Tensor:
    expand, depthwise, gate, project = arguments[:7], arguments[7:14], arguments[14:20], arguments[20:26]
    *window, residual = arguments[26:]
    if expand[0] is None:
        d = dwconv.dwconv(x, depthwise[0], *NO_NORM, *depthwise[1:], *window)
    else:
        d = expand_dwconv(x, expand[0].flatten(1), *expand[1:], *depthwise, *window)
    gates = None
    if gate[0] is not None:
        w1, b1, w2, b2, *activations = gate
        gates = gate_of(dwconv.mean(d), w1.flatten(1), b1, w2.flatten(1), b2, *activations)
    weight, mean, var, gamma, beta, eps = project
    norm = mean, var, gamma, beta, eps, Activation.IDENTITY
    return pointwise_inference(d, weight.flatten(1), *norm, gates, x if residual else None)


f32, f16, bf16 = DTYPES

CORE: list[dict[str, Any]] = [
    # As networks call it: one tile, several, no expansion, a gate in float32, no gate.
    dict(shape=(2, 16, 7, 7), outputs=16, dtype=f16, residual=True),
    dict(shape=(1, 16, 30, 32), outputs=24, dtype=f16, stride=2, padding="same"),
    dict(shape=(1, 24, 14, 14), outputs=24, dtype=bf16, kernel_size=5, residual=True, wide_gate=True),
    dict(shape=(1, 32, 17, 15), outputs=16, dtype=f16, ratio=0),
    dict(shape=(2, 16, 9, 9), outputs=24, ratio=4, squeezed=0),
    dict(shape=(2, 12, 9, 9), outputs=12, residual=True, layout="nchw"),
    dict(shape=(1, 32, 17, 15), outputs=16, dtype=f16, ratio=0, layout="nchw"),
    # The expansion has a launch of its own: windows of 7, too many channels.
    dict(shape=(2, 8, 9, 9), outputs=8, dtype=f16, kernel_size=7, residual=True),
    dict(shape=(1, 840, 7, 7), outputs=16, dtype=f16, ratio=1, squeezed=0),
    dict(shape=(0, 8, 6, 6), outputs=8, ratio=2),
]


def _cases() -> Iterator[Case]:
    for core in CORE:
        yield MbconvInference(tag="core", **core)
    for layout, dtype, act in itertools.product(
        ("nchw", "sliced nchw", "sliced channels_last"), DTYPES, (Activation.SILU, Activation.HARDSWISH)
    ):
        yield MbconvInference(shape=(2, 17, 9, 8), outputs=17, dtype=dtype, layout=layout, act=act, residual=True)


CASES = list(_cases())
