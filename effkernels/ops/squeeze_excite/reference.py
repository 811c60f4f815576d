"""Squeeze-excite in plain PyTorch: the `eager` backend, and what the kernels are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import activate


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


def channel_scale(x: Tensor, gate: Tensor) -> Tensor:
    """As `scale`, multiplied in the dtype of `gate` and rounded once, as the kernels do."""
    return (x.to(gate.dtype) * gate[:, :, None, None]).to(x.dtype)


def scale(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.to(x.dtype)[:, :, None, None]
