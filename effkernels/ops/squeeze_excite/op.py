"""Squeeze-excite: the phases `spatial_mean`, `se_gate`, its backward, `channel_scale`, and the fusion of them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Flops, Op
from effkernels.ops.batch_norm.op import spread, statistics_dtype
from effkernels.ops.squeeze_excite import reference


def _spatial_mean_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=statistics_dtype(x))


def _spatial_mean_setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _spatial_mean_backward(backend: str, ctx: Any, grad: Tensor) -> Tensor:
    return spread(grad, ctx.shape, ctx.dtype).expand(ctx.shape)


# Mean over the map, [N, C, H, W] -> [N, C] in float32 (float64 for float64).
SPATIAL_MEAN = Op(
    "spatial_mean",
    "(Tensor x) -> Tensor",
    fake=_spatial_mean_fake,
    setup_context=_spatial_mean_setup,
    backward=_spatial_mean_backward,
)
SPATIAL_MEAN.implement_in_triton("effkernels.ops.squeeze_excite.triton")


def _se_gate_fake(
    pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: int, gate: int
) -> Tensor:
    return pooled.new_empty(pooled.shape)


def _se_gate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.act, ctx.gate = inputs
    ctx.save_for_backward(output, *tensors)


def _se_gate_backward(backend: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gates, pooled, w1, b1, w2, b2 = ctx.saved_tensors
    return *gate_backward(backend, grad, gates, pooled, w1, b1, w2, b2, ctx.act, ctx.gate), None, None


def gate_backward(
    backend: str, grad: Tensor, gates: Tensor, pooled: Tensor,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: int, gate: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of pooled, w1, b1, w2, b2."""
    backward = partial(SE_GATE_BACKWARD, backend) if backend in SE_GATE_BACKWARD.overloads else reference.gate_backward
    of_pooled, _, of_w1, of_b1, of_w2, of_b2 = backward(grad[None], gates, pooled[None], w1, b1, w2, act, gate, 1)
    return of_pooled, of_w1, None if b1 is None else of_b1, of_w2, None if b2 is None else of_b2


# gate(w2 act(w1 pooled + b1) + b2): [N, C] -> [N, C] in the dtype of `pooled`; w1 [R, C], w2 [C, R], of one dtype.
SE_GATE = Op(
    "se_gate",
    "(Tensor pooled, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int act, int gate) -> Tensor",
    fake=_se_gate_fake,
    setup_context=_se_gate_setup,
    backward=_se_gate_backward,
    flops=lambda pooled, w1, b1, w2, *_: Flops(2 * pooled.shape[0] * (w1.numel() + w2.numel())),
)
SE_GATE.implement_in_triton("effkernels.ops.squeeze_excite.triton")


def _se_gate_backward_fake(
    grad: Tensor, gates: Tensor, pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
    act: int, gate: int, area: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    of_weights = (w1.new_empty(shape) for shape in (w1.shape, w1.shape[:1], w2.shape, w2.shape[:1]))
    sums = gates.new_empty((grad.shape[0] - 1, gates.shape[1]))
    return gates.new_empty(gates.shape), sums, *of_weights


# The backward of `se_gate`, whose output is `gates`, of means over `area` pixels. The first of [1 or 3, N, C] is the
# gradient of the gates in `grad`, and those means in `pooled`. Their gradient over `area` is `shift`, what goes back to
# each pixel. Of the other rows, `sums` are those of gates * grad + shift * pooled over the images: a BatchNorm's two if
# grad comes from `pointwise_backward` and pooled from `bn_pool`. Weights' gradients are of the dtype of the weights.
SE_GATE_BACKWARD = Op(
    "se_gate_backward",
    "(Tensor grad, Tensor gates, Tensor pooled, Tensor w1, Tensor? b1, Tensor w2, int act, int gate, SymInt area)"
    " -> (Tensor shift, Tensor sums, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)",
    backends=("cpp", "triton"),
    fake=_se_gate_backward_fake,
    flops=lambda grad, gates, pooled, w1, *_: Flops(10 * gates.shape[0] * w1.numel()),
)
SE_GATE_BACKWARD.implement_in_triton("effkernels.ops.squeeze_excite.triton")

# x * gate[:, :, None, None], multiplied in float32 and rounded once.
CHANNEL_SCALE = Op(
    "channel_scale",
    "(Tensor x, Tensor gate) -> Tensor",
    fake=lambda x, gate: empty_map(x, x.shape),
)
CHANNEL_SCALE.implement_in_triton("effkernels.ops.squeeze_excite.triton")


def _squeeze_excite(
    backend: str, x: Tensor, pooled: Tensor | None,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: int, gate: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # An op must not return its argument: a mean that was given is not given back.
    mean = SPATIAL_MEAN(backend, x) if pooled is None else x.new_empty(0, dtype=pooled.dtype)
    g = SE_GATE(backend, mean if pooled is None else pooled, w1, b1, w2, b2, act, gate)
    return CHANNEL_SCALE(backend, x, g), mean, g


def _squeeze_excite_fake(
    x: Tensor, pooled: Tensor | None,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: int, gate: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = _spatial_mean_fake(x)
    return empty_map(x, x.shape), torch.empty_like(g) if pooled is None else g.new_empty(0), g


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, given, *weights, ctx.act, ctx.gate = inputs
    _, mean, g = output
    ctx.mark_non_differentiable(mean, g)
    ctx.pooled_given = given is not None
    ctx.save_for_backward(x, mean if given is None else given, g, *weights)


def _backward(backend: str, ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, pooled, g, w1, b1, w2, b2 = ctx.saved_tensors
    need_x, *need_gate = ctx.needs_input_grad[:6]
    grad_x = grad_y * g.to(x.dtype)[:, :, None, None] if need_x else None
    if not any(need_gate) and ctx.pooled_given:
        return grad_x, *(None,) * 7
    grad_gate = (grad_y * x).sum((2, 3), dtype=g.dtype)
    grad_pooled, *grad_weights = gate_backward(backend, grad_gate, g, pooled, w1, b1, w2, b2, ctx.act, ctx.gate)
    if ctx.pooled_given:
        return grad_x, grad_pooled, *grad_weights, None, None
    if grad_x is not None:
        grad_x = grad_x + spread(grad_pooled, x.shape, x.dtype)
    return grad_x, None, *grad_weights, None, None


SQUEEZE_EXCITE = Op(
    "squeeze_excite",
    "(Tensor x, Tensor? pooled, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int act, int gate)"
    " -> (Tensor y, Tensor mean, Tensor gate_values)",
    fake=_squeeze_excite_fake,
    setup_context=_setup_context,
    backward=_backward,
)
SQUEEZE_EXCITE.compose(_squeeze_excite)
