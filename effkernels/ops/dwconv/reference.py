"""`dwconv_bn_swish` in plain PyTorch: the `eager` backend, and what the kernels are held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import activate
from effkernels.ops._geometry import extra_padding


def dwconv_bn_act(
    x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float, eps: float,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int, act: int, pool: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    k = weight.shape[2]
    bottom = extra_padding(x.shape[2], out_h, pad_top, k, stride)
    right = extra_padding(x.shape[3], out_w, pad_left, k, stride)
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom))
    d = F.conv2d(x, weight, None, stride, (pad_top, pad_left), 1, x.shape[1])
    y = activate(F.batch_norm(d, running_mean, running_var, gamma, beta, training, momentum, eps), act)
    return y, mean(y) if pool else None


def mean(x: Tensor) -> Tensor:
    """[N, C], accumulated and returned in at least float32."""
    return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
