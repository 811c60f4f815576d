"""`expand_dwconv` and its backward in plain PyTorch: what the kernels are held against."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from effkernels.ops.batch_norm.reference import norm_act
from effkernels.ops.dwconv.reference import conv, dwconv_backward


def expand_dwconv(
    x: Tensor, expand: Tensor,
    mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None, eps1: float, act1: int,
    depthwise: Tensor,
    mean2: Tensor | None, var2: Tensor | None, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int,
) -> Tensor:  # fmt: skip
    """The map that `expand_dwconv` stores."""
    e = norm_act(F.conv2d(x, expand[:, :, None, None]), mean1, var1, gamma1, beta1, eps1, act1)
    d = conv(e, depthwise, stride, pad_top, pad_left, out_h, out_w)
    return norm_act(d, mean2, var2, gamma2, beta2, eps2, act2)


def expand_dwconv_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *before, x, expand, centre = arguments[:15]
    var1, gamma1, eps1 = (arguments[i] for i in (16, 17, 19))
    weight = expand[:, :, None, None]
    given: list[Any] = [*before, F.conv2d(x, weight), *arguments[15:-4], True, True]
    dz1, grad_weight, sums = dwconv_backward(*given)
    factor = (var1 + eps1).rsqrt() if gamma1 is None else (var1 + eps1).rsqrt() * gamma1
    de = (dz1 * factor[:, None, None]).to(x.dtype)
    centred = x if centre is None else (x - centre[:, None, None]).to(x.dtype)
    grad_expand = conv2d_weight(centred, weight.shape, de)[:, :, 0, 0]
    return F.conv_transpose2d(de, weight), grad_expand.to(sums.dtype), grad_weight, sums
