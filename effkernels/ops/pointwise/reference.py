"""The 1x1 convolution's phases in plain PyTorch: what the kernels are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import activate
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.batch_norm.reference import affine, grad_of_input, grad_of_norm, norm_act, statistics


def pointwise(
    x: Tensor, weight: Tensor,
    mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
    gate: Tensor | None, bias: Tensor | None, residual: Tensor | None, reduce: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    h = norm_act(x.to(wide), mean, var, gamma, beta, eps, act)
    if gate is not None:
        h = h * gate[:, :, None, None]
    y = F.conv2d(h.to(x.dtype), weight[:, :, None, None]).to(wide)
    if bias is not None:
        y = y + bias[:, None, None]
    if residual is not None:
        y = y + residual
    y = y.to(x.dtype)
    if reduce == Reduce.MEAN:
        return y, y.mean((2, 3), dtype=wide)
    if reduce == Reduce.STATISTICS:
        return y, statistics(y)
    return y, y.new_empty(0, dtype=wide)


def pointwise_backward(
    grad: Tensor, scale: Tensor | None, y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, eps2: float,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    eps1: float, act1: int, gate: Tensor | None, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dz, yhat = grad_of_norm(grad, scale, None, y, mean2, var2, None, None, eps2, 0)
    dy = grad_of_input(dz, yhat, var2, gamma2, eps2, grad_means).to(x.dtype)
    grad_gated, sums, grad_weight = x.new_empty(0), mean2.new_empty(0), mean2.new_empty(0)
    if need_input:
        grad_gated = F.conv2d(dy, weight.T[:, :, None, None])
        if mean1 is not None and var1 is not None:
            sums = gated_sums(grad_gated, x, mean1, var1, gamma1, beta1, eps1, act1)
    if need_weight:
        h = norm_act(x.to(mean2.dtype), mean1, var1, gamma1, beta1, eps1, act1)
        if gate is not None:
            h = h * gate[:, :, None, None]
        grad_weight = torch.einsum("nohw,nchw->oc", dy.to(h.dtype), h.to(x.dtype).to(h.dtype))
    return grad_gated, sums, grad_weight


def gated_sums(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int
) -> Tensor:
    """The sums over the map of grad * h, grad * act'(bn(x)) and grad * act'(bn(x)) * xhat with h = act(bn(x))."""
    dz, xhat = grad_of_norm(grad, None, None, x, mean, var, gamma, beta, eps, act)
    h = activate(affine(xhat, gamma, beta), act)
    return torch.stack([v.sum((2, 3)) for v in (grad.to(h.dtype) * h, dz, dz * xhat)])
