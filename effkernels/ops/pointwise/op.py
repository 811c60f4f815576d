"""The 1x1 convolution between its neighbours: the phases `pointwise` and `pointwise_backward`."""

from typing import Any

import torch
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Flops, Op
from effkernels.ops.batch_norm.op import fake_sums, statistics_dtype


def _pointwise_fake(
    x: Tensor, weight: Tensor,
    mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
    gate: Tensor | None, bias: Tensor | None, residual: Tensor | None, reduce: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = empty_map(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
    return y, fake_sums(y, reduce)


# y = weight (act(bn(x)) * gate) + bias + residual, rounded once: weight is [O, C] in the dtype of x, gate [N, C] and
# bias [O] are in `statistics_dtype`, residual is like y; the BatchNorm is there where its mean is given. `reduce` is of
# y as stored, as in `dwconv`.
POINTWISE = Op(
    "pointwise",
    "(Tensor x, Tensor weight,"
    " Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, int act,"
    " Tensor? gate, Tensor? bias, Tensor? residual, int reduce) -> (Tensor y, Tensor sums)",
    backends=("cpp", "triton"),
    fake=_pointwise_fake,
    flops=lambda x, weight, *_: Flops(2 * x[:, 0].numel() * weight.numel()),
)
POINTWISE.implement_in_triton("effkernels.ops.pointwise.triton")


def _pointwise_backward_fake(
    grad: Tensor, scale: Tensor | None, y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, eps2: float,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    eps1: float, act1: int, gate: Tensor | None, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = statistics_dtype(x)
    n, c = x.shape[:2]
    return (
        empty_map(x, x.shape) if need_input else x.new_empty(0),
        x.new_empty((3, n, c) if need_input and mean1 is not None else (0,), dtype=wide),
        torch.empty_like(weight, dtype=wide) if need_weight else x.new_empty(0, dtype=wide),
    )


def _pointwise_backward_flops(*arguments: Any) -> Flops:
    y, weight, (need_input, need_weight) = arguments[2], arguments[8], arguments[-2:]
    return Flops((need_input + need_weight) * 2 * y[:, 0].numel() * weight.numel())


# The backward of y = weight (h * gate), h = act1(bn1(x)), where y went on through bn2 and `scale` [N, O] and `grad` is
# the gradient of what came out; bn1 is there where its mean is given. With dy the gradient of y,
#     dy = gamma2 / sqrt(var2 + eps2) * (grad * scale - grad_means[0] - yhat * grad_means[1]),
# grad_means [2, O] being the means over batch and map of grad * scale and of grad * scale * yhat, None where the
# statistics are fixed, it returns
#     G = weight^T dy, the gradient of h * gate, as x is laid out,
#     the sums over the map of G * h, G * act1'(bn1(x)) and G * act1'(bn1(x)) * xhat [3, N, C], of G as stored, for bn1,
#     the gradient of weight [O, C], in `statistics_dtype`;
# what is not needed is empty.
POINTWISE_BACKWARD = Op(
    "pointwise_backward",
    "(Tensor grad, Tensor? scale, Tensor y, Tensor mean2, Tensor var2, Tensor? gamma2, float eps2,"
    " Tensor? grad_means, Tensor weight,"
    " Tensor x, Tensor? mean1, Tensor? var1, Tensor? gamma1, Tensor? beta1, float eps1, int act1,"
    " Tensor? gate, bool need_input, bool need_weight)"
    " -> (Tensor grad_gated, Tensor sums, Tensor grad_weight)",
    backends=("cpp", "triton"),
    fake=_pointwise_backward_fake,
    flops=_pointwise_backward_flops,
)
POINTWISE_BACKWARD.implement_in_triton("effkernels.ops.pointwise.triton")
