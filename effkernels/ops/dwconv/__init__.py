"""Depthwise convolution, BatchNorm and Swish in one op."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels import backends
from effkernels.ops import _checks
from effkernels.ops._activation import ACTIVATIONS, activate
from effkernels.ops._geometry import resolve_padding
from effkernels.ops.batch_norm import Running, update_running_statistics
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.batch_norm.synchronised import group_name
from effkernels.ops.dwconv import op, reference

KERNEL_SIZES = (3, 5, 7)
STRIDES = (1, 2)
_NAME = "dwconv_bn_swish"


class Norm(NamedTuple):
    """BatchNorm with known statistics, [C] each, followed by an activation."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str


def dwconv_bn_swish(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int = 1,
    padding: int | str = "auto",
    activation: str = "silu",
    return_pooled: bool = False,
    process_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution, BatchNorm and activation: `act(bn(conv(x)))` (MBConv, arXiv:1905.11946).

    Equivalent to `F.silu(F.batch_norm(F.conv2d(x, weight, stride=stride, padding=k // 2, groups=C), running_mean,
    running_var, bn_weight, bn_bias, training, momentum, eps))`. Inference reads x once and writes y once; training
    saves x and the raw convolution output for backward, nothing else.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or (cpp, eager) float64; NCHW or channels_last, slices too.
        weight: [C, 1, k, k], k in 3, 5, 7; the dtype of x. Under autocast both are cast as `F.conv2d` casts them.
        bn_weight, bn_bias: [C] or None; float32 or the dtype of x.
        running_mean, running_var: [C]; used when not training, else updated in place with `momentum`, unless None.
        stride: 1 or 2.
        padding: rows and columns of zeros on each side, "auto" (k // 2) or "same" (TensorFlow's, uneven).
        activation: "silu", "relu", "relu6", "hardswish" or "identity".
        return_pooled: also return the mean of y over its map, [N, C] in float32 (float64 for float64), from the same
            pass: squeeze-excite's input.
        process_group: whose processes share batch statistics, as for `bn_act`.

    Returns:
        y [N, C, Ho, Wo] in the dtype and layout of x; or (y, pooled).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or batch statistics would be of
            a single value per channel.
        RuntimeError: the backend asked for by `use_backend` cannot run, or is "eager" and there is a process group.
    """
    x, weight, window = _arguments(_NAME, x, weight, stride, padding)
    channels = x.shape[1]
    _checks.batch_norm(_NAME, x, channels, bn_weight, bn_bias, running_mean, running_var, training)
    act = _checks.code(_NAME, "activation", activation, ACTIVATIONS)
    out_h, out_w = window[3:]
    count = x.shape[0] * out_h * out_w
    if training and process_group is None:
        _checks.more_than_one_value(_NAME, count, [x.shape[0], channels, out_h, out_w])

    norm = (bn_weight, bn_bias, running_mean, running_var)
    backend = backends.choose(_NAME, x)
    group = group_name(_NAME, process_group if training else None, backend)
    pooled: Tensor | None
    if backend == "eager":
        y, pooled = reference.dwconv_bn_act(x, weight, *norm, training, momentum, eps, *window, act, return_pooled)
    elif training or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, *norm))):
        y, pooled, _, stats = op.DWCONV_BN_ACT(
            backend, x, weight, *norm, training, group, eps, *window, act, return_pooled
        )
        if training:
            update_running_statistics(Running(running_mean, running_var, stats, count, momentum))
    else:
        reduce = Reduce.MEAN if return_pooled else Reduce.NONE
        epilogue = (running_mean, running_var, bn_weight, bn_bias, eps, act)
        y, pooled = op.DWCONV(backend, x, weight, *op.NO_NORM, *epilogue, *window, reduce)
    if not return_pooled:
        return y
    assert pooled is not None
    return y, pooled


def bn_act_dwconv_bn_act(
    x: Tensor,
    before: Norm,
    weight: Tensor,
    after: Norm,
    *,
    stride: int = 1,
    padding: int | str = "auto",
    return_pooled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`dwconv_bn_swish(bn_act(x, *before), weight, *after)` in one pass over x and y: inference only, no gradients.

    Args:
        x: [N, C, H, W], the raw output of the convolution before.
        before, after: BatchNorm with running statistics and the name of the activation.
        weight, stride, padding, return_pooled: as for `dwconv_bn_swish`.

    Returns:
        y [N, C, Ho, Wo] in the dtype and layout of x, and its mean over the map [N, C] or None.

    Raises:
        TypeError, ValueError: as `dwconv_bn_swish`.
        RuntimeError: the backend asked for by `use_backend` cannot run.
    """
    name = "bn_act_dwconv_bn_act"
    x, weight, window = _arguments(name, x, weight, stride, padding)
    first, second = (_norm_arguments(name, x, norm) for norm in (before, after))
    backend = backends.choose(name, x)
    if backend == "eager":
        z = activate(F.batch_norm(x, *before[:4], False, 0.0, before.eps), first[-1])
        return reference.dwconv_bn_act(
            z, weight, after.weight, after.bias, after.running_mean, after.running_var, False, 0.0, after.eps,
            *window, second[-1], return_pooled,
        )  # fmt: skip
    reduce = Reduce.MEAN if return_pooled else Reduce.NONE
    y, pooled = op.DWCONV(backend, x, weight, *first, *second, *window, reduce)
    return y, pooled if return_pooled else None


def _norm_arguments(name: str, x: Tensor, norm: Norm) -> tuple[Any, ...]:
    _checks.batch_norm(name, x, x.shape[1], norm.weight, norm.bias, norm.running_mean, norm.running_var, False)
    return *norm[:5], _checks.code(name, "activation", norm.activation, ACTIVATIONS)


def _arguments(
    name: str, x: Tensor, weight: Tensor, stride: int, padding: int | str
) -> tuple[Tensor, Tensor, tuple[int, int, int, int, int]]:
    """x and weight, checked and cast as autocast asks, and the window: stride, padding before, output size."""
    _checks.map_tensor(name, "x", x)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: weight must be a tensor [C, 1, k, k], got {type(weight).__name__}")
    if weight.dim() != 4 or weight.shape[2] not in KERNEL_SIZES or weight.shape[3] != weight.shape[2]:
        raise ValueError(f"{name}: weight must be [C, 1, k, k] with k in {KERNEL_SIZES}, got {list(weight.shape)}")
    k = weight.shape[2]
    _checks.shaped(name, "weight", weight, [x.shape[1], 1, k, k], x)
    if isinstance(stride, bool) or not isinstance(stride, int) or stride not in STRIDES:
        raise ValueError(f"{name}: stride must be one of {STRIDES}, got {stride!r}")
    dtype = _checks.autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    _checks.same_dtype(name, "weight", weight, "x", x)
    pad_top, out_h = resolve_padding(name, padding, x.shape[2], k, stride)
    pad_left, out_w = resolve_padding(name, padding, x.shape[3], k, stride)
    return x, weight, (stride, pad_top, pad_left, out_h, out_w)
