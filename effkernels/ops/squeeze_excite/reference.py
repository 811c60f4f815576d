"""Squeeze-excite in plain PyTorch: the `eager` backend, and what the kernels are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import Activation, activate, activate_backward


def se_gate(
    x: Tensor, pooled: Tensor | None,
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: int, gate: int,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    if pooled is None:
        pooled = x.mean((2, 3), dtype=wide)
    return gate_of(pooled, w1, b1, w2, b2, act, gate)


def gate_of(
    pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: int, gate: int
) -> Tensor:
    """The gate, computed in the dtype of `pooled` [N, C]."""
    w1, w2 = w1.to(pooled.dtype), w2.to(pooled.dtype)
    b1, b2 = (None if b is None else b.to(pooled.dtype) for b in (b1, b2))
    return activate(F.linear(activate(F.linear(pooled, w1, b1), act), w2, b2), gate)


def gate_backward(
    grad: Tensor, gates: Tensor, pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
    act: int, gate: int, area: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `SE_GATE_BACKWARD`."""
    wide1, wide2 = w1.to(gates.dtype), w2.to(gates.dtype)
    u1 = F.linear(pooled[0], wide1, None if b1 is None else b1.to(gates.dtype))  # [N, R]
    slope = gates * (1 - gates) if gate == Activation.SIGMOID else ((gates > 0) & (gates < 1)).to(gates.dtype) / 6
    grad_u2 = grad[0] * slope  # [N, C]
    grad_u1 = activate_backward(grad_u2 @ wide2, u1, act)
    shift = grad_u1 @ wide1 / area
    of_weights = grad_u1.T @ pooled[0], grad_u1.sum(0), grad_u2.T @ activate(u1, act), grad_u2.sum(0)
    return shift, (gates * grad[1:] + shift * pooled[1:]).sum(1), *(t.to(w1.dtype) for t in of_weights)


def channel_scale(x: Tensor, gate: Tensor) -> Tensor:
    """As `scale`, multiplied in the dtype of `gate` and rounded once, as the kernels do."""
    return (x.to(gate.dtype) * gate[:, :, None, None]).to(x.dtype)


def scale(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.to(x.dtype)[:, :, None, None]
