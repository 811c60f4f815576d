"""Layers that PyTorch lacks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkernels.ops._geometry import extra_padding, resolve_padding


class Conv2dSame(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: ceil(size / stride) outputs, an odd row or column at the end."""

    def forward(self, x: Tensor) -> Tensor:
        before, after = [], []
        for size, k, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            pad, out = resolve_padding("Conv2dSame", "same", size, k, stride)
            before.append(pad)
            after.append(extra_padding(size, out, pad, k, stride))
        if any(after):
            x = F.pad(x, (0, after[1], 0, after[0]))
        return F.conv2d(x, self.weight, self.bias, self.stride, before, self.dilation, self.groups)


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drops whole images of a residual branch, and scales the others up."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"DropPath: p must be a probability, got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0 or not self.training:
            return x
        keep = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * (keep if self.p == 1 else keep.div_(1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"
