"""`expand_dwconv` in plain PyTorch: what the kernels are held against."""

import torch.nn.functional as F
from torch import Tensor

from effkernels.ops.batch_norm.reference import norm_act
from effkernels.ops.dwconv.reference import conv


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
