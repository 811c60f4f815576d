"""BatchNorm and activation: the phase ops of forward and backward, and `bn_act`, the differentiable fusion.

In all of them bn(x) = gamma * xhat + beta with xhat = (x - mean) / sqrt(var + eps); vectors per image, [N, C], are in
`statistics_dtype`.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Op
from effkernels.ops.batch_norm.synchronised import means_of_all, statistics_of_all


class Reduce(IntEnum):
    """What a kernel sums over its output as stored, in the pass that writes it (the same codes in csrc/common)."""

    NONE = 0
    MEAN = 1  # over the map: [N, C]
    STATISTICS = 2  # over batch and map: [2, C], mean and biased variance


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def spread(grad_mean: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient that a mean over the map gives to each pixel, [N, C] -> [N, C, 1, 1]."""
    return (grad_mean / (shape[2] * shape[3])).to(dtype)[:, :, None, None]


def fake_sums(y: Tensor, reduce: int) -> Tensor:
    n, c = y.shape[:2]
    shape = {Reduce.NONE: (0,), Reduce.MEAN: (n, c), Reduce.STATISTICS: (2, c)}[Reduce(reduce)]
    return y.new_empty(shape, dtype=statistics_dtype(y))


def _bn_statistics_fake(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=statistics_dtype(x))


# Batch statistics [2, C] of x: mean and biased variance.
BN_STATISTICS = Op("bn_statistics", "(Tensor x) -> Tensor", fake=_bn_statistics_fake)
BN_STATISTICS.implement_in_triton("effkernels.ops.batch_norm.triton")


def _bn_apply_fake(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int, reduce: int
) -> tuple[Tensor, Tensor]:
    y = empty_map(x, x.shape)
    return y, fake_sums(y, reduce)


# y = act(gamma * (x - mean) / sqrt(var + eps) + beta), and with Reduce.MEAN its mean over the map [N, C].
BN_APPLY = Op(
    "bn_apply",
    "(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, int act, int reduce)"
    " -> (Tensor y, Tensor sums)",
    fake=_bn_apply_fake,
)
BN_APPLY.implement_in_triton("effkernels.ops.batch_norm.triton")


def _bn_pool_fake(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int, slopes: bool
) -> Tensor:
    return x.new_empty((3 if slopes else 1, *x.shape[:2]), dtype=statistics_dtype(x))


# Of h = act(bn(x)), per image and channel: its mean over the map; and with `slopes` the sums over the map of
# act'(bn(x)) and of act'(bn(x)) * xhat, which a gradient that is constant over the map adds to BatchNorm's backward.
BN_POOL = Op(
    "bn_pool",
    "(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, int act, bool slopes) -> Tensor",
    backends=("cpp", "triton"),
    fake=_bn_pool_fake,
)
BN_POOL.implement_in_triton("effkernels.ops.batch_norm.triton")


def _bn_residual_fake(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    scale: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return empty_map(x, x.shape)


# y = bn(x) * scale + residual, rounded once; `scale` is [N, C], the factors of stochastic depth.
BN_RESIDUAL = Op(
    "bn_residual",
    "(Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, Tensor? scale, Tensor? residual)"
    " -> Tensor",
    backends=("cpp", "triton"),
    fake=_bn_residual_fake,
)
BN_RESIDUAL.implement_in_triton("effkernels.ops.batch_norm.triton")


def _bn_backward_sums_fake(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
) -> Tensor:  # fmt: skip
    return _bn_statistics_fake(x)


# The gradients of beta and gamma [2, C]: the sums over batch and map of dz and of dz * xhat, where
# dz = (grad * scale + shift) * act'(bn(x)); `scale` and `shift` are [N, C], without them 1 and 0.
BN_BACKWARD_SUMS = Op(
    "bn_backward_sums",
    "(Tensor grad, Tensor? scale, Tensor? shift,"
    " Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, int act) -> Tensor",
    fake=_bn_backward_sums_fake,
)
BN_BACKWARD_SUMS.implement_in_triton("effkernels.ops.batch_norm.triton")


def _bn_backward_fake(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
    grad_means: Tensor | None,
) -> Tensor:  # fmt: skip
    return empty_map(x, x.shape)


# The gradient of x from that dz: gamma / sqrt(var + eps) * (dz - grad_means[0] - xhat * grad_means[1]), grad_means
# [2, C] being the means over batch and map of dz and of dz * xhat, None where the statistics are fixed.
BN_BACKWARD = Op(
    "bn_backward",
    "(Tensor grad, Tensor? scale, Tensor? shift,"
    " Tensor x, Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, float eps, int act, Tensor? grad_means)"
    " -> Tensor",
    fake=_bn_backward_fake,
)
BN_BACKWARD.implement_in_triton("effkernels.ops.batch_norm.triton")


def fake_statistics(x: Tensor, group: str) -> Tensor:
    return x.new_empty((3 if group else 2, x.shape[1]), dtype=statistics_dtype(x))


def settled(stats: Tensor, mean: Tensor | None, var: Tensor | None, x: Tensor, group: str) -> Tensor:
    """The fixed statistics if there are any, else those of the batch x, and of those of the other processes."""
    if mean is None:
        return statistics_of_all(stats, x, group)
    assert var is not None
    return torch.stack([mean, var]).to(statistics_dtype(x))


def batch_statistics(backend: str, x: Tensor, mean: Tensor | None, var: Tensor | None, group: str) -> Tensor:
    """`settled`, of a map whose statistics no other pass has taken."""
    return settled(BN_STATISTICS(backend, x) if mean is None else x.new_empty(0), mean, var, x, group)


def _bn_act(
    backend: str, x: Tensor, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, group: str, eps: float, act: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    stats = batch_statistics(backend, x, *((None, None) if training else (running_mean, running_var)), group)
    return BN_APPLY(backend, x, stats[0], stats[1], gamma, beta, eps, act, Reduce.NONE)[0], stats


def _bn_act_fake(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, group: str, eps: float, act: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return empty_map(x, x.shape), fake_statistics(x, group)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, _, _, ctx.training, ctx.group, ctx.eps, ctx.act = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gamma, beta, output[1])


def _backward(backend: str, ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, gamma, beta, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    if grad_y is None:
        return (None,) * 9
    norm = (stats[0], stats[1], gamma, beta, ctx.eps, ctx.act)
    sums, means = backward_sums(backend, ctx, any(needs[1:]), grad_y, None, x, norm, stats)
    grad_x = BN_BACKWARD(backend, grad_y, None, None, x, *norm, means) if needs[0] else None
    return *gradients((x, gamma, beta), (grad_x, sums[1], sums[0]), needs), *(None,) * 6


def backward_sums(
    backend: str, ctx: Any, needed: bool, grad: Tensor, shift: Tensor | None,
    x: Tensor, norm: tuple[Any, ...], stats: Tensor,
) -> tuple[Sequence[Tensor | None], Tensor | None]:  # fmt: skip
    """The gradients of beta and gamma if they are `needed`, and the means of `bn_backward`: as `ctx` has it, whose
    attributes are `training` and `group`."""
    if not (ctx.training or needed):
        return (None, None), None
    if x.numel():
        sums = BN_BACKWARD_SUMS(backend, grad, None, shift, x, *norm)
    else:
        sums = stats.new_zeros((2, x.shape[1]))  # of values without statistics
    return sums, means_of_all(sums, stats, x, ctx.group) if ctx.training else None


def gradients(
    inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Those that are needed, in the dtype of their input."""
    return tuple(
        grad.to(t.dtype) if need and grad is not None and t is not None else None
        for t, grad, need in zip(inputs, grads, needs, strict=True)
    )


BN_ACT = Op(
    "bn_act",
    "(Tensor x, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, bool training, str group,"
    " float eps, int act) -> (Tensor y, Tensor stats)",
    fake=_bn_act_fake,
    setup_context=_setup_context,
    backward=_backward,
)
BN_ACT.compose(_bn_act)
