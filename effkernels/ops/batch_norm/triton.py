"""The BatchNorm phases in Triton: passes of `stream_kernel`, and the sums that backward needs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._triton import (
    Spans,
    activate_with_slope,
    affine,
    centre,
    channel_block,
    dense,
    load_drift,
    load_inverse_deviation,
    load_norm,
    load_per_image,
    norm_backward,
    scale_shift,
    span_start,
    stream,
    strides,
    sums_add,
    sums_per_image,
    sums_start,
    sums_store,
)
from effkernels.ops.batch_norm.op import Reduce


def bn_statistics(x: Tensor) -> Tensor:
    return stream(x, None, reduce=Reduce.STATISTICS)


def bn_apply(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int, reduce: int
) -> tuple[Tensor, Tensor]:
    y = empty_map(x, x.shape)
    return y, stream(x, y, mean, var, gamma, beta, eps, act, reduce=reduce)


def bn_residual(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float,
    scale: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    y = empty_map(x, x.shape)
    stream(x, y, mean, var, gamma, beta, eps, gate=scale, residual=residual)
    return y


@triton.jit(do_not_specialize=["spans", "steps", "parts"])
def bn_sums_kernel(
    grad_ptr, scale_ptr, shift_ptr, x_ptr, parts_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps,
    channels, height, width, spans, steps, parts, share,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    ACT: tl.constexpr, POOL: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    """POOL: the mean of act(bn(x)); SLOPES: the sums of dz and of dz * xhat, of a gradient of 1 where none is given."""
    offs_c, part = channel_block(channels, 8, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    n, row, first = span_start(part, height, spans, steps)
    norm = load_norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_c, mask_c)
    inverse_deviation = load_inverse_deviation(var_ptr, eps, offs_c, mask_c)
    scale = load_per_image(scale_ptr, n, channels, offs_c, mask_c)
    shift = load_per_image(shift_ptr, n, channels, offs_c, mask_c)
    x_ptrs = x_ptr + n * x_stride_n + offs_c * x_stride_c + row * x_stride_h
    if grad_ptr is not None:
        grad_ptrs = grad_ptr + n * grad_stride_n + offs_c * grad_stride_c + row * grad_stride_h
    pixels = tl.expand_dims(tl.arange(0, BLOCK_P), 1 - PIXEL_AXIS)
    zeros = tl.zeros((BLOCK_P, BLOCK_C) if PIXEL_AXIS == 0 else (BLOCK_C, BLOCK_P), tl.float32)
    pooled = sums_start(zeros, POOL)
    slopes = sums_start(zeros, 2 * SLOPES)
    for step in range(first, first + steps):
        offs_p = tl.cast(step, tl.int64) * BLOCK_P + pixels
        mask = (offs_p < width) & mask_c
        centred = centre(tl.load(x_ptrs + offs_p * x_stride_w, mask, 0.0).to(tl.float32), norm)
        h, dz = activate_with_slope(affine(centred, norm), ACT)
        if grad_ptr is not None:
            grad = tl.load(grad_ptrs + offs_p * grad_stride_w, mask, 0.0).to(tl.float32)
            dz *= scale_shift(grad, scale, shift)
        pooled = sums_add(pooled, (h * share,), mask)
        slopes = sums_add(slopes, (dz, dz * (centred * inverse_deviation)), mask)
    sums_store(pooled + slopes, parts_ptr, part, parts, channels, offs_c, mask_c, PIXEL_AXIS)


def bn_sums(
    grad: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
    pool: bool, slopes: bool,
) -> Tensor:  # fmt: skip
    """The parts of the sums, [sums, parts, C], those of an image in a row."""
    batch, channels, height, width = x.shape
    share = Spans.of(x, grad, reduces=True)
    parts = x.new_empty((pool + 2 * slopes, share.parts, channels), dtype=torch.float32)
    if batch:
        bn_sums_kernel[(share.programs,)](
            grad, *dense(scale, shift), x, parts, *dense(mean, var, gamma, beta), eps,
            channels, share.height, share.width, share.spans, share.steps, share.parts, 1 / (height * width),
            *strides(grad), *x.stride(),
            ACT=act, POOL=pool, SLOPES=slopes, **share.tile,
        )  # fmt: skip
    return parts


def bn_pool(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int, slopes: bool
) -> Tensor:
    parts = bn_sums(None, None, None, x, mean, var, gamma, beta, eps, act, True, slopes)
    return sums_per_image(parts, x.shape[0])


def bn_backward_sums(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
) -> Tensor:  # fmt: skip
    return bn_sums(grad, scale, shift, x, mean, var, gamma, beta, eps, act, False, True).sum(1)


@triton.jit
def bn_backward_kernel(
    grad_ptr, scale_ptr, shift_ptr, x_ptr, y_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, means_ptr,
    channels, height, width, spans, steps,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, x_stride_n, x_stride_c, x_stride_h, x_stride_w,
    y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    offs_c, part = channel_block(channels, 8, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    n, row, first = span_start(part, height, spans, steps)
    norm = load_norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_c, mask_c)
    drift = load_drift(means_ptr, var_ptr, eps, channels, offs_c, mask_c)
    scale = load_per_image(scale_ptr, n, channels, offs_c, mask_c)
    shift = load_per_image(shift_ptr, n, channels, offs_c, mask_c)
    pixels = tl.expand_dims(tl.arange(0, BLOCK_P), 1 - PIXEL_AXIS)
    x_ptrs = x_ptr + n * x_stride_n + offs_c * x_stride_c + row * x_stride_h
    grad_ptrs = grad_ptr + n * grad_stride_n + offs_c * grad_stride_c + row * grad_stride_h
    y_ptrs = y_ptr + n * y_stride_n + offs_c * y_stride_c + row * y_stride_h
    for step in range(first, first + steps):
        offs_p = tl.cast(step, tl.int64) * BLOCK_P + pixels
        mask = (offs_p < width) & mask_c
        centred = centre(tl.load(x_ptrs + offs_p * x_stride_w, mask, 0.0).to(tl.float32), norm)
        grad = tl.load(grad_ptrs + offs_p * grad_stride_w, mask, 0.0).to(tl.float32)
        _, slope = activate_with_slope(affine(centred, norm), ACT)
        dz = scale_shift(grad, scale, shift) * slope
        tl.store(y_ptrs + offs_p * y_stride_w, norm_backward(dz, centred, norm, drift), mask)


def bn_backward(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
    grad_means: Tensor | None,
) -> Tensor:  # fmt: skip
    y = empty_map(x, x.shape)
    share = Spans.of(x, grad, y, reduces=False)
    if x.shape[0]:
        bn_backward_kernel[(share.programs,)](
            grad, *dense(scale, shift), x, y, *dense(mean, var, gamma, beta), eps, *dense(grad_means),
            x.shape[1], share.height, share.width, share.spans, share.steps,
            *grad.stride(), *x.stride(), *y.stride(), ACT=act, **share.tile,
        )  # fmt: skip
    return y
