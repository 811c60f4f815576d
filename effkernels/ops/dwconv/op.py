"""The depthwise convolution: `dwconv`, its phase op, and `dwconv_bn_act`, the differentiable fusion."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkernels.ops._geometry import covered
from effkernels.ops._layout import empty_map
from effkernels.ops._op import Flops, Op
from effkernels.ops.batch_norm.op import (
    BN_APPLY,
    Reduce,
    backward_sums,
    fake_statistics,
    fake_sums,
    gradients,
    settled,
    statistics_dtype,
)

NO_NORM = (None, None, None, None, 0.0, 0)  # no prologue, or no epilogue


def _dwconv_fake(
    x: Tensor, weight: Tensor,
    mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None, eps1: float, act1: int,
    mean2: Tensor | None, var2: Tensor | None, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int, reduce: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, c = x.shape[:2]
    y = empty_map(x, (n, c, out_h, out_w))
    return y, fake_sums(y, reduce)


def _dwconv_parts_read(x: Tensor, weight: Tensor, *rest: Any) -> dict[str, Sequence[int]]:
    stride, top, left, out_h, out_w, _ = rest[-6:]
    (n, c, h, w), k = x.shape, weight.shape[2]
    return {"x": (n, c, covered(h, out_h, top, k, stride), covered(w, out_w, left, k, stride))}


def _dwconv_flops(x: Tensor, weight: Tensor, *rest: Any) -> Flops:
    *_, out_h, out_w, _ = rest
    return Flops(depthwise=2 * x.shape[0] * weight.numel() * out_h * out_w)


# y = act2(bn2(conv(act1(bn1(x))))): prologue and epilogue are applied where their mean is given; padding is zero after
# the prologue. `reduce` adds, from the same pass over y as stored, its mean over the map [N, C] or its batch statistics
# [2, C] (mean, biased variance).
DWCONV = Op(
    "dwconv",
    "(Tensor x, Tensor weight,"
    " Tensor? mean1, Tensor? var1, Tensor? gamma1, Tensor? beta1, float eps1, int act1,"
    " Tensor? mean2, Tensor? var2, Tensor? gamma2, Tensor? beta2, float eps2, int act2,"
    " int stride, SymInt pad_top, SymInt pad_left, SymInt out_h, SymInt out_w, int reduce) -> (Tensor y, Tensor sums)",
    fake=_dwconv_fake,
    parts_read=_dwconv_parts_read,
    flops=_dwconv_flops,
)
DWCONV.implement_in_triton("effkernels.ops.dwconv.triton")


def _dwconv_backward_fake(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    eps1: float, act1: int,
    stride: int, pad_top: int, pad_left: int, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = statistics_dtype(x)
    return (
        empty_map(x, x.shape) if need_input else x.new_empty(0),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=wide),
        x.new_empty((2, x.shape[1]) if need_input and mean1 is not None else (0,), dtype=wide),
    )


def _dwconv_backward_flops(*arguments: Any) -> Flops:
    y, weight, (need_input, need_weight) = arguments[3], arguments[11], arguments[-2:]
    return Flops(depthwise=(need_input + need_weight) * 2 * y.numel() * weight.shape[2] ** 2)


# The backward of y = conv(act1(bn1(x))), where y went on through act2(bn2(y)) and grad * scale + shift is the gradient
# of what came out; scale and shift are [N, C], without them 1 and 0. With dz2 that of bn2(y) and dy that of y,
#     dz2 = (grad * scale + shift) * act2'(bn2(y)),
#     dy = gamma2 / sqrt(var2 + eps2) * (dz2 - grad_means[0] - yhat * grad_means[1]),
# grad_means [2, C] being the means over batch and map of dz2 and of dz2 * yhat, None where the statistics are fixed, it
# returns
#     dz1, the gradient of bn1(x), or of x where there is no mean1, as x is laid out,
#     the gradient of weight [C, 1, k, k], in `statistics_dtype`,
#     with mean1, the sums over batch and map of dz1 and of dz1 * xhat [2, C], of dz1 as stored;
# what is not needed is empty.
DWCONV_BACKWARD = Op(
    "dwconv_backward",
    "(Tensor grad, Tensor? scale, Tensor? shift,"
    " Tensor y, Tensor mean2, Tensor var2, Tensor? gamma2, Tensor? beta2, float eps2, int act2,"
    " Tensor? grad_means, Tensor weight,"
    " Tensor x, Tensor? mean1, Tensor? var1, Tensor? gamma1, Tensor? beta1, float eps1, int act1,"
    " int stride, SymInt pad_top, SymInt pad_left, bool need_input, bool need_weight)"
    " -> (Tensor grad_norm, Tensor grad_weight, Tensor sums)",
    fake=_dwconv_backward_fake,
    flops=_dwconv_backward_flops,
)
DWCONV_BACKWARD.implement_in_triton("effkernels.ops.dwconv.triton")


def _dwconv_bn_act(
    backend: str,
    x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, group: str, eps: float,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int, act: int, pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    reduce = Reduce.STATISTICS if training else Reduce.NONE
    d, stats = DWCONV(backend, x, weight, *NO_NORM, *NO_NORM, stride, pad_top, pad_left, out_h, out_w, reduce)
    stats = settled(stats, *((None, None) if training else (running_mean, running_var)), d, group)
    pooling = Reduce.MEAN if pool else Reduce.NONE
    y, pooled = BN_APPLY(backend, d, stats[0], stats[1], gamma, beta, eps, act, pooling)
    return y, pooled, d, stats


def _dwconv_bn_act_fake(
    x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, group: str, eps: float,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int, act: int, pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, c = x.shape[:2]
    y = empty_map(x, (n, c, out_h, out_w))
    pooled = x.new_empty((n, c) if pool else (0,), dtype=statistics_dtype(x))
    return y, pooled, torch.empty_like(y), fake_statistics(x, group)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, gamma, beta, _, _, ctx.training, ctx.group, ctx.eps, ctx.stride, *window, ctx.act, ctx.pool = inputs
    ctx.top, ctx.left, _, _ = window
    _, _, d, stats = output
    ctx.mark_non_differentiable(d, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, gamma, beta, d, stats)


def _backward(
    backend: str, ctx: Any, grad_y: Tensor | None, grad_pooled: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    x, weight, gamma, beta, d, stats = ctx.saved_tensors
    shift = grad_pooled / (d.shape[2] * d.shape[3]) if ctx.pool and grad_pooled is not None else None
    if grad_y is None:
        if shift is None:
            return (None,) * 16
        grad_y = d.new_zeros(()).expand_as(d)
    need_x, need_weight, *need_affine = needs = ctx.needs_input_grad[:4]
    norm = (stats[0], stats[1], gamma, beta, ctx.eps, ctx.act)
    sums, means = backward_sums(backend, ctx, any(need_affine), grad_y, shift, d, norm, stats)
    grad_x = grad_weight = None
    if need_x or need_weight:
        grad_x, grad_weight, _ = DWCONV_BACKWARD(
            backend, grad_y, None, shift, d, *norm, means, weight, x, *NO_NORM, ctx.stride, ctx.top, ctx.left,
            need_x, need_weight,
        )  # fmt: skip
    return *gradients((x, weight, gamma, beta), (grad_x, grad_weight, sums[1], sums[0]), needs), *(None,) * 12


DWCONV_BN_ACT = Op(
    "dwconv_bn_act",
    "(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var,"
    " bool training, str group, float eps, int stride, SymInt pad_top, SymInt pad_left, SymInt out_h, SymInt out_w,"
    " int act, bool pool) -> (Tensor y, Tensor pooled, Tensor d, Tensor stats)",
    fake=_dwconv_bn_act_fake,
    setup_context=_setup_context,
    backward=_backward,
)
DWCONV_BN_ACT.compose(_dwconv_bn_act)
