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
    w1, w2 = w1.to(wide), w2.to(wide)
    b1, b2 = (None if b is None else b.to(wide) for b in (b1, b2))
    return activate(F.linear(activate(F.linear(pooled, w1, b1), act), w2, b2), gate)


def scale(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate.to(x.dtype)[:, :, None, None]
