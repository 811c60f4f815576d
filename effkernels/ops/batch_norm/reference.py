"""The BatchNorm phases in plain PyTorch: what the kernels are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import activate, activate_backward


def norm_act(
    x: Tensor, mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int
) -> Tensor:
    """The activation of BatchNorm with given statistics, or of x itself where there are none."""
    if mean is not None:
        # Beside half precision each of these may have x's dtype or float32.
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, var, gamma, beta = (None if v is None else v.to(wide) for v in (mean, var, gamma, beta))
        x = F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps)
    return activate(x, act)


def statistics(x: Tensor) -> Tensor:
    """Mean and biased variance of each channel, [2, C], in at least float32; NaN if x is empty."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel() == 0:
        return wide.new_full((2, x.shape[1]), torch.nan)
    return torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0)[::-1])


def normalized(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """xhat = (x - mean) / sqrt(var + eps), in the dtype of the statistics."""
    return F.batch_norm(x.to(mean.dtype), mean, var, None, None, False, 0.0, eps)


def affine(xhat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    z = xhat if gamma is None else xhat * per_channel(gamma)
    return z if beta is None else z + per_channel(beta)


def per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


def grad_of_norm(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dz = (grad * scale + shift) * act'(bn(x)), and xhat."""
    xhat = normalized(x, mean, var, eps)
    dh = grad.to(xhat.dtype)
    if scale is not None:
        dh = dh * scale[:, :, None, None]
    if shift is not None:
        dh = dh + shift[:, :, None, None]
    return activate_backward(dh, affine(xhat, gamma, beta), act), xhat


def grad_of_input(
    dz: Tensor, xhat: Tensor, var: Tensor, gamma: Tensor | None, eps: float, grad_means: Tensor | None
) -> Tensor:
    """The gradient of x from that of bn(x); `grad_means` are the means of dz and of dz * xhat, None where the
    statistics are fixed."""
    if grad_means is not None:
        dz = dz - per_channel(grad_means[0]) - xhat * per_channel(grad_means[1])
    factor = (var + eps).rsqrt()
    return dz * per_channel(factor if gamma is None else factor * gamma)


def bn_pool(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int, slopes: bool
) -> Tensor:
    xhat = normalized(x, mean, var, eps)
    z = affine(xhat, gamma, beta)
    pooled = activate(z, act).mean((2, 3))
    if not slopes:
        return pooled[None]
    slope = activate_backward(torch.ones_like(z), z, act)
    return torch.stack([pooled, slope.sum((2, 3)), (slope * xhat).sum((2, 3))])


def bn_residual(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    scale: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    y = affine(normalized(x, mean, var, eps), gamma, beta)
    if scale is not None:
        y = y * scale[:, :, None, None]
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)


def bn_backward_sums(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
) -> Tensor:  # fmt: skip
    dz, xhat = grad_of_norm(grad, scale, shift, x, mean, var, gamma, beta, eps, act)
    return torch.stack([dz.sum((0, 2, 3)), (dz * xhat).sum((0, 2, 3))])


def bn_backward(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
    grad_means: Tensor | None,
) -> Tensor:  # fmt: skip
    dz, xhat = grad_of_norm(grad, scale, shift, x, mean, var, gamma, beta, eps, act)
    return grad_of_input(dz, xhat, var, gamma, eps, grad_means).to(x.dtype)
