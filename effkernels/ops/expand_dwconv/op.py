"""The expansion and the depthwise convolution in one kernel: `expand_dwconv`, and its backward."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkernels import _native
from effkernels.ops._geometry import covered
from effkernels.ops._layout import empty_map
from effkernels.ops._op import Flops, Op
from effkernels.ops.batch_norm.op import Reduce, fake_sums, statistics_dtype


def _expand_dwconv_fake(x: Tensor, expand: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, out_h, out_w, reduce = rest
    d = x.new_empty((x.shape[0], expand.shape[0], out_h, out_w)).to(memory_format=torch.channels_last)
    return d, fake_sums(d, reduce)


def _expand_dwconv_parts_read(x: Tensor, *rest: Any) -> dict[str, Sequence[int]]:
    depthwise = rest[7]
    stride, top, left, out_h, out_w, _ = rest[-6:]
    (n, c, h, w), k = x.shape, depthwise.shape[2]
    return {"x": (n, c, covered(h, out_h, top, k, stride), covered(w, out_w, left, k, stride))}


def _expand_dwconv_flops(x: Tensor, expand: Tensor, *rest: Any) -> Flops:
    depthwise = rest[6]
    *_, out_h, out_w, _ = rest
    return Flops(2 * x[:, 0].numel() * expand.numel(), 2 * x.shape[0] * depthwise.numel() * out_h * out_w)


# d = act2(bn2(dwconv(act1(bn1(expand x))))), with zeros around the expanded map; expand is [hidden, C], depthwise
# [hidden, 1, k, k], and d in channels_last, whatever x is. `reduce` adds what it adds to `dwconv`. The
# expanded map is never stored; CUDA rounds it to the dtype of x, and takes as many C as fit its shared memory.
EXPAND_DWCONV = Op(
    "expand_dwconv",
    "(Tensor x,"
    " Tensor expand, Tensor? mean1, Tensor? var1, Tensor? gamma1, Tensor? beta1, float eps1, int act1,"
    " Tensor depthwise, Tensor? mean2, Tensor? var2, Tensor? gamma2, Tensor? beta2, float eps2, int act2,"
    " int stride, SymInt pad_top, SymInt pad_left, SymInt out_h, SymInt out_w, int reduce) -> (Tensor d, Tensor sums)",
    backends=("cpp", "cuda"),
    fake=_expand_dwconv_fake,
    parts_read=_expand_dwconv_parts_read,
    flops=_expand_dwconv_flops,
)


def _expand_dwconv_backward_fake(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, expand: Tensor, mean1: Tensor, var1: Tensor, gamma1: Tensor | None, beta1: Tensor | None,
    eps1: float, act1: int,
    stride: int, pad_top: int, pad_left: int, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (n, _, h, w), hidden, wide = x.shape, expand.shape[0], statistics_dtype(x)
    grad_norm = x.new_empty((n, hidden, h, w)).to(memory_format=torch.channels_last)
    return (
        grad_norm if need_input else x.new_empty(0),
        weight.new_empty(weight.shape if need_weight else (0,), dtype=wide),
        x.new_empty((2, hidden) if need_input else (0,), dtype=wide),
    )


def _expand_dwconv_backward_flops(*arguments: Any) -> Flops:
    y, weight, x, expand, (need_input, need_weight) = *(arguments[i] for i in (3, 11, 12, 13)), arguments[-2:]
    depthwise = (need_input + need_weight) * 2 * y.numel() * weight.shape[2] ** 2
    return Flops(2 * x[:, 0].numel() * expand.numel(), depthwise)


# `dwconv_backward` of e = expand x, which is computed again and never stored; expand is [hidden, C]. Its first result,
# the gradient of bn1(e), is [N, hidden, H, W] in channels_last, whatever x is.
EXPAND_DWCONV_BACKWARD = Op(
    "expand_dwconv_backward",
    "(Tensor grad, Tensor? scale, Tensor? shift,"
    " Tensor y, Tensor mean2, Tensor var2, Tensor? gamma2, Tensor? beta2, float eps2, int act2,"
    " Tensor? grad_means, Tensor weight,"
    " Tensor x, Tensor expand, Tensor mean1, Tensor var1, Tensor? gamma1, Tensor? beta1, float eps1, int act1,"
    " int stride, SymInt pad_top, SymInt pad_left, bool need_input, bool need_weight)"
    " -> (Tensor grad_norm, Tensor grad_weight, Tensor sums)",
    backends=("cuda",),
    fake=_expand_dwconv_backward_fake,
    flops=_expand_dwconv_backward_flops,
)


def _expand_dwconv_gradients_fake(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, expand: Tensor, centre: Tensor | None,
    mean1: Tensor, var1: Tensor, gamma1: Tensor | None, beta1: Tensor | None, eps1: float, act1: int,
    stride: int, pad_top: int, pad_left: int, need_sums: bool, need_x: bool, need_expand: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = statistics_dtype(x)
    return (
        empty_map(x, x.shape) if need_x else x.new_empty(0),
        x.new_empty(expand.shape if need_expand else (0,), dtype=wide),
        x.new_empty(weight.shape if need_weight else (0,), dtype=wide),
        x.new_empty((2, expand.shape[0]) if need_sums else (0,), dtype=wide),
    )


def _expand_dwconv_gradients_flops(*arguments: Any) -> Flops:
    y, weight, x, expand = (arguments[i] for i in (3, 11, 12, 13))
    need_sums, need_x, need_expand, need_weight = arguments[-4:]
    depthwise = ((need_sums or need_x or need_expand) + need_weight) * 2 * y.numel() * weight.shape[2] ** 2
    return Flops((1 + need_x + need_expand) * 2 * x[:, 0].numel() * expand.numel(), depthwise)


# `expand_dwconv_backward` and what follows, with neither e nor the gradient of bn1(e) in memory. With dz1 that gradient
# times gamma1 / sqrt(var1 + eps1), it returns
#     expand^T dz1, as x is laid out,
#     dz1 (x - centre)^T, summed over batch and map, [hidden, C]; centre is [C], without it 0,
#     the gradient of weight, and BatchNorm's sums, as `dwconv_backward`;
# what is not needed is empty.
EXPAND_DWCONV_GRADIENTS = Op(
    "expand_dwconv_gradients",
    "(Tensor grad, Tensor? scale, Tensor? shift,"
    " Tensor y, Tensor mean2, Tensor var2, Tensor? gamma2, Tensor? beta2, float eps2, int act2,"
    " Tensor? grad_means, Tensor weight,"
    " Tensor x, Tensor expand, Tensor? centre,"
    " Tensor mean1, Tensor var1, Tensor? gamma1, Tensor? beta1, float eps1, int act1,"
    " int stride, SymInt pad_top, SymInt pad_left, bool need_sums, bool need_x, bool need_expand, bool need_weight)"
    " -> (Tensor grad_x, Tensor grad_expand, Tensor grad_weight, Tensor sums)",
    backends=("cpp",),
    fake=_expand_dwconv_gradients_fake,
    flops=_expand_dwconv_gradients_flops,
)


def fits(device: torch.device, dtype: torch.dtype, channels: int, kernel_size: int, stride: int) -> bool:
    """Whether tiles of both CUDA kernels, in training, fit the shared memory of a block: for maps [N, channels, H, W]
    of any size."""
    shared = {}
    if device.type == "cuda" and torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(device)
        shared = dict(shared_per_block=properties.shared_memory_per_block_optin)
    return _fits(str(dtype).removeprefix("torch."), channels, kernel_size, stride, **shared)


# What `torch.compiler.assume_constant_result` does; but that imports all of torch._dynamo.
fits._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _fits(dtype: str, channels: int, kernel_size: int, stride: int, **shared: int) -> bool:
    plans = _native.introspection
    if plans is None:
        return False
    size, hidden, pad = 512, 64, kernel_size // 2  # no map has larger tiles

    def a_map(channels: int, size: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        return 0, (1, channels, size, size), (size * size * channels, 1, size * channels, channels)

    x, e, d = a_map(channels, size), a_map(hidden, size), a_map(hidden, size // stride)
    norm = (0,) * 4, 0.0, 0, 0
    window = kernel_size, stride, pad, pad
    forward = plans.expand_dwconv_plan(x, d, dtype, 0, norm, 0, norm, *window, Reduce.STATISTICS, False, **shared)
    backward = plans.dwconv_backward_plan(
        d, d, (norm, 0, 0, 0), 0, e, norm, e, dtype, True, *window, True, narrow=x, **shared
    )
    return forward is not None and backward is not None
