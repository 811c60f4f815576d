"""`pointwise_inference` in plain PyTorch: what the kernels are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels.ops.batch_norm.reference import norm_act


def pointwise_inference(
    x: Tensor, weight: Tensor,
    mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
    gate: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    gated = x if gate is None else (x * gate[:, :, None, None]).to(x.dtype)
    y = norm_act(F.conv2d(gated, weight[:, :, None, None]).to(wide), mean, var, gamma, beta, eps, act)
    return (y if residual is None else y + residual).to(x.dtype)
