"""A dense convolution, BatchNorm, activation and shortcut in inference, and the same with its weight packed once."""

from typing import Any

import torch
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Flops, Op
from effkernels.ops.batch_norm.op import statistics_dtype

_LAYER = "Tensor weight, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps"
_CALL = "Tensor? shortcut, int act, int stride, SymInt pad_top, SymInt pad_left, SymInt out_h, SymInt out_w"


def _conv_inference_fake(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    return empty_map(x, (x.shape[0], weight.shape[0], *arguments[-2:]))


# act(bn(conv(x))) + shortcut; weight [out, C, kh, kw].
CONV_INFERENCE = Op(
    "conv_inference",
    f"(Tensor x, {_LAYER}, {_CALL}) -> Tensor",
    fake=_conv_inference_fake,
    backends=("cpp",),
    flops=lambda x, weight, *rest: Flops(2 * x.shape[0] * weight.numel() * rest[-2] * rest[-1]),
)


def _conv_pack_fake(weight: Tensor, *rest: Any) -> Tensor:
    # How a weight is laid out depends on the CPU and on the stride.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=statistics_dtype(weight))


CONV_PACK = Op("conv_pack", f"({_LAYER}, int stride) -> Tensor", fake=_conv_pack_fake, backends=("cpp",))


def _conv_packed_fake(x: Tensor, packed: Tensor, out_channels: int, *arguments: Any) -> Tensor:
    return empty_map(x, (x.shape[0], out_channels, *arguments[-2:]))


def _conv_packed_flops(x: Tensor, packed: Tensor, out_channels: int, *rest: Any) -> Flops:
    kernel_h, kernel_w, *_, out_h, out_w = rest
    return Flops(2 * x.shape[0] * out_channels * x.shape[1] * kernel_h * kernel_w * out_h * out_w)


CONV_PACKED = Op(
    "conv_packed",
    f"(Tensor x, Tensor packed, int out_channels, int kernel_h, int kernel_w, {_CALL}) -> Tensor",
    fake=_conv_packed_fake,
    backends=("cpp",),
    flops=_conv_packed_flops,
)
