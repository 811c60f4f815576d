"""The 1x1 convolution in inference: `pointwise_inference`."""

from typing import Any

from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Flops, Op


def _pointwise_inference_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return empty_map(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


# y = act(bn(weight (x * gate))) + residual, rounded once, but x * gate, which is rounded to the dtype of x. weight is
# [O, C] in that dtype, gate [N, C] in float32, residual like y; the BatchNorm is there where its mean is given.
POINTWISE_INFERENCE = Op(
    "pointwise_inference",
    "(Tensor x, Tensor weight,"
    " Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, int act,"
    " Tensor? gate, Tensor? residual) -> Tensor",
    backends=("cuda",),
    fake=_pointwise_inference_fake,
    flops=lambda x, weight, *_: Flops(2 * x[:, 0].numel() * weight.numel()),
)
