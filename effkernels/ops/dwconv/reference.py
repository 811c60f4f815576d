"""The depthwise convolution in plain PyTorch: the `eager` backend, and what the kernels are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import activate, activate_backward
from effkernels.ops._geometry import extra_padding
from effkernels.ops.batch_norm.reference import affine, grad_of_input, grad_of_norm, norm_act, normalized

aten = torch.ops.aten


def dwconv_bn_act(
    x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float, eps: float,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int, act: int, pool: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    d = conv(x, weight, stride, pad_top, pad_left, out_h, out_w)
    y = activate(F.batch_norm(d, running_mean, running_var, gamma, beta, training, momentum, eps), act)
    return y, mean(y) if pool else None


def dwconv(
    x: Tensor, weight: Tensor,
    mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None, eps1: float, act1: int,
    mean2: Tensor | None, var2: Tensor | None, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int,
) -> Tensor:  # fmt: skip
    """The map that the phase op `dwconv` stores."""
    x = norm_act(x, mean1, var1, gamma1, beta1, eps1, act1)
    d = conv(x, weight, stride, pad_top, pad_left, out_h, out_w)
    return norm_act(d, mean2, var2, gamma2, beta2, eps2, act2)


def conv(x: Tensor, weight: Tensor, stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int) -> Tensor:
    k = weight.shape[2]
    bottom = extra_padding(x.shape[2], out_h, pad_top, k, stride)
    right = extra_padding(x.shape[3], out_w, pad_left, k, stride)
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom))
    return F.conv2d(x, weight, None, stride, (pad_top, pad_left), 1, x.shape[1])


def mean(x: Tensor) -> Tensor:
    """[N, C], accumulated and returned in at least float32."""
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


def dwconv_backward(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    eps1: float, act1: int,
    stride: int, pad_top: int, pad_left: int, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dz2, yhat = grad_of_norm(grad, scale, shift, y, mean2, var2, gamma2, beta2, eps2, act2)
    dy = grad_of_input(dz2, yhat, var2, gamma2, eps2, grad_means)
    xhat = x.to(dy.dtype)
    z = xhat
    if mean1 is not None:
        assert var1 is not None
        xhat = normalized(x, mean1, var1, eps1)
        z = affine(xhat, gamma1, beta1)
    h, w = x.shape[2:]
    # The library's formula pads both sides alike: what "same" adds at the end is made explicit.
    bottom = extra_padding(h, y.shape[2], pad_top, weight.shape[2], stride)
    right = extra_padding(w, y.shape[3], pad_left, weight.shape[2], stride)
    padded = F.pad(activate(z, act1), (0, right, 0, bottom)).to(x.dtype)
    dh, grad_weight, _ = aten.convolution_backward(
        dy.to(x.dtype), padded, weight, None, (stride, stride), (pad_top, pad_left), (1, 1), False, (0, 0),
        x.shape[1], (need_input, need_weight, False),
    )  # fmt: skip
    dz1, sums = x.new_empty(0), dy.new_empty(0)
    if need_input:
        dz1 = activate_backward(dh[:, :, :h, :w].to(z.dtype), z, act1).to(x.dtype)
        if mean1 is not None:
            wide = dz1.to(dy.dtype)
            sums = torch.stack([wide.sum((0, 2, 3)), (wide * xhat).sum((0, 2, 3))])
    return dz1, grad_weight.to(dy.dtype) if need_weight else dy.new_empty(0), sums
