"""A dense convolution, BatchNorm, activation and shortcut in one op: inference only, no gradients."""

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from effkernels import backends
from effkernels.ops import _checks
from effkernels.ops._activation import ACTIVATIONS, activate
from effkernels.ops._geometry import extra_padding, resolve_padding
from effkernels.ops.conv_inference import op
from effkernels.ops.dwconv import Norm

_NAME = "conv_bn_act"


class Convolution(NamedTuple):
    """A convolution without bias, and the BatchNorm and activation that follow it."""

    weight: Tensor
    norm: Norm


@dataclass(frozen=True)
class PackedConvolution:
    """A convolution whose weight was rearranged for the CPU that this process runs on."""

    weight: Tensor
    shape: tuple[int, int, int]  # out, kh, kw
    act: int
    stride: int
    padding: int | str

    def __call__(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        window = _window(x, *self.shape[1:], self.stride, self.padding)
        y: Tensor = op.CONV_PACKED("cpp", x, self.weight, *self.shape, shortcut, self.act, *window)
        return y


def conv_bn_act(
    x: Tensor,
    convolution: Convolution,
    *,
    stride: int = 1,
    padding: int | str = "auto",
    shortcut: Tensor | None = None,
) -> Tensor:
    """Convolution, BatchNorm with known statistics and activation: `act(bn(conv(x)))`, plus `shortcut` if given.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64; NCHW or channels_last, slices too.
        convolution: weight [out, C, kh, kw] in the dtype of x, its norm in that or float32.
        stride: of rows and columns.
        padding: rows and columns of zeros on each side, "auto" (k // 2) or "same" (TensorFlow's, uneven).
        shortcut: [N, out, Ho, Wo] in the dtype of x.

    Returns:
        [N, out, Ho, Wo] in the dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by `use_backend` cannot run, or has no such kernel.
    """
    _checks.map_tensor(_NAME, "x", x)
    weight, norm = convolution
    if weight.dim() != 4:
        raise ValueError(f"{_NAME}: convolution.weight must be [out, C, kh, kw], got {list(weight.shape)}")
    out, _, kh, kw = weight.shape
    _checks.shaped(_NAME, "convolution.weight", weight, [out, x.shape[1], kh, kw], x)
    _checks.same_dtype(_NAME, "convolution.weight", weight, "x", x)
    _checks.batch_norm(_NAME, x, out, norm.weight, norm.bias, norm.running_mean, norm.running_var, False)
    act = _checks.code(_NAME, "convolution.norm.activation", norm.activation, ACTIVATIONS)
    window = _window(x, kh, kw, stride, padding)
    if shortcut is not None:
        _checks.shaped(_NAME, "shortcut", shortcut, [x.shape[0], out, *window[-2:]], x)
        _checks.same_dtype(_NAME, "shortcut", shortcut, "x", x)
    backend = backends.choose(_NAME, x, among=op.CONV_INFERENCE.kernels)
    if backend == "eager":
        _, top, left, out_h, out_w = window
        bottom = extra_padding(x.shape[2], out_h, top, kh, stride)
        right = extra_padding(x.shape[3], out_w, left, kw, stride)
        z = F.conv2d(F.pad(x, (0, right, 0, bottom)), weight, None, stride, (top, left))
        z = F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return activate(z, act) if shortcut is None else activate(z, act) + shortcut
    y: Tensor = op.CONV_INFERENCE(backend, x, weight, *norm[:5], shortcut, act, *window)
    return y


def pack_convolution(convolution: Convolution, *, stride: int = 1, padding: int | str = "auto") -> PackedConvolution:
    """The same convolution with its weight rearranged once, for many calls on this CPU."""
    weight, norm = convolution
    packed: Tensor = op.CONV_PACK("cpp", weight, *norm[:5], stride)
    out, _, kh, kw = weight.shape
    return PackedConvolution(packed, (out, kh, kw), ACTIVATIONS[norm.activation], stride, padding)


def _window(x: Tensor, kernel_h: int, kernel_w: int, stride: int, padding: int | str) -> tuple[int, int, int, int, int]:
    pad_top, out_h = resolve_padding(_NAME, padding, x.shape[2], kernel_h, stride)
    pad_left, out_w = resolve_padding(_NAME, padding, x.shape[3], kernel_w, stride)
    return stride, pad_top, pad_left, out_h, out_w
