"""The 1x1 convolution and its backward in Triton, as matrix products over the pixels of an image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._triton import (
    REGISTERS,
    activate_with_slope,
    affine,
    centre,
    channel_block,
    dense,
    empty_parts,
    finish,
    is_one_row,
    load_drift,
    load_inverse_deviation,
    load_norm,
    load_per_image,
    norm_act,
    norm_backward,
    pixel_axis,
    reduce_tile,
    scale_shift,
    strides,
    sum_of_products,
    sums_per_image,
)

PROGRAMS = 512  # of backward, a few for each multiprocessor: each adds up a weight gradient of its own


@triton.jit
def map_ptrs(ptr, n, channels, pixels, width, stride_n, stride_c, stride_h, stride_w, ONE_ROW: tl.constexpr):
    if ONE_ROW:
        offsets = pixels.to(tl.int64) * stride_w
    else:
        offsets = (pixels // width).to(tl.int64) * stride_h + (pixels % width).to(tl.int64) * stride_w
    return ptr + n * stride_n + channels.to(tl.int64) * stride_c + offsets


@triton.jit(do_not_specialize=["tiles"])
def pointwise_kernel(
    x_ptr, w_ptr, y_ptr, parts_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, gate_ptr, bias_ptr, residual_ptr,
    channels, outputs, area, width, tiles, share,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    residual_stride_n, residual_stride_c, residual_stride_h, residual_stride_w,
    ACT: tl.constexpr, REDUCE: tl.constexpr, ONE_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_P pixels of an image and BLOCK_O outputs. Each block of outputs activates its pixels again."""
    offs_o, part = channel_block(outputs, 8, BLOCK_O, PIXEL_AXIS)
    mask_o = offs_o < outputs
    n = (part // tiles).to(tl.int64)
    pixels = tl.expand_dims(part % tiles * BLOCK_P + tl.arange(0, BLOCK_P), 1 - PIXEL_AXIS)
    mask_p = pixels < area

    y = tl.zeros((BLOCK_P, BLOCK_O) if PIXEL_AXIS == 0 else (BLOCK_O, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_C):
        block = start + tl.arange(0, BLOCK_C)
        offs_c = tl.expand_dims(block, PIXEL_AXIS)
        mask_c = offs_c < channels
        x_ptrs = map_ptrs(
            x_ptr, n, offs_c, pixels, width, x_stride_n, x_stride_c, x_stride_h, x_stride_w, ONE_ROW
        )  # fmt: skip
        x = tl.load(x_ptrs, mask_p & mask_c, 0.0)
        if mean_ptr is not None or ACT != 0 or gate_ptr is not None:
            norm = load_norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_c, mask_c)
            gate = load_per_image(gate_ptr, n, channels, offs_c, mask_c)
            x = scale_shift(norm_act(x.to(tl.float32), norm, ACT), gate, ()).to(x_ptr.dtype.element_ty)
        w_block = tl.expand_dims(block, 1 - PIXEL_AXIS)
        w = tl.load(w_ptr + offs_o * channels + w_block, mask_o & (w_block < channels), 0.0)
        if PIXEL_AXIS == 0:
            y = tl.dot(x, w, y, input_precision=PRECISION)
        else:
            y = tl.dot(w, x, y, input_precision=PRECISION)

    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_o, mask_o, 0.0)
    if residual_ptr is not None:
        residual_ptrs = map_ptrs(
            residual_ptr, n, offs_o, pixels, width,
            residual_stride_n, residual_stride_c, residual_stride_h, residual_stride_w, ONE_ROW,
        )  # fmt: skip
        y += tl.load(residual_ptrs, mask_p & mask_o, 0.0).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    y_ptrs = map_ptrs(y_ptr, n, offs_o, pixels, width, y_stride_n, y_stride_c, y_stride_h, y_stride_w, ONE_ROW)
    tl.store(y_ptrs, y, mask_p & mask_o)
    reduce_tile(y, mask_p, parts_ptr, part, outputs, offs_o, mask_o, share, PIXEL_AXIS, REDUCE)


def precision() -> str:
    """Of products of float32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def is_multiplied_on_ordinary_units(x: Tensor) -> bool:
    """From registers, which must hold whole tiles: for 16 bits `tl.dot` uses tensor cores from sm_80 on."""
    if x.dtype == torch.float32:
        return True
    return not triton.knobs.runtime.interpret and triton.runtime.driver.active.get_current_target().arch < 80


def tile_size(extent: int, limit: int) -> int:
    """A power of two that `tl.dot` takes."""
    return min(limit, max(triton.next_power_of_2(extent), 16))


def pointwise(
    x: Tensor, weight: Tensor,
    mean: Tensor | None, var: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int,
    gate: Tensor | None, bias: Tensor | None, residual: Tensor | None, reduce: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (batch, channels, height, width), outputs = x.shape, weight.shape[0]
    area = height * width
    y = empty_map(x, (batch, outputs, height, width))
    wide = is_multiplied_on_ordinary_units(x)
    block_p, block_o = tile_size(area, 64 if wide else 128), tile_size(outputs, 64)
    tiles = triton.cdiv(area, block_p)
    parts = empty_parts(y, batch * tiles, reduce)
    if batch:
        pointwise_kernel[(batch * tiles * triton.cdiv(outputs, block_o),)](
            x, weight.contiguous(), y, parts, *dense(mean, var, gamma, beta), eps, *dense(gate, bias), residual,
            channels, outputs, area, width, tiles, 1 / area, *x.stride(), *y.stride(), *strides(residual),
            ACT=act, REDUCE=reduce, ONE_ROW=all(t is None or is_one_row(t) for t in (x, y, residual)),
            PRECISION=precision(), BLOCK_P=block_p, BLOCK_O=block_o, BLOCK_C=tile_size(channels, 16 if wide else 32),
            PIXEL_AXIS=pixel_axis(x), num_warps=8 if block_p * block_o >= 64 * 64 else 4, maxnreg=REGISTERS,
        )  # fmt: skip
    return y, finish(parts, batch, reduce)


@triton.jit
def load_grad(
    grad_ptr, y_ptr, scale_ptr, n, pixels, offs_o, mask, outputs, width, norm, drift,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    ONE_ROW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dy of a tile; zero beyond the map."""
    grad_ptrs = map_ptrs(
        grad_ptr, n, offs_o, pixels, width, grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, ONE_ROW
    )  # fmt: skip
    y_ptrs = map_ptrs(y_ptr, n, offs_o, pixels, width, y_stride_n, y_stride_c, y_stride_h, y_stride_w, ONE_ROW)
    grad = tl.load(grad_ptrs, mask, 0.0).to(tl.float32)
    grad = scale_shift(grad, load_per_image(scale_ptr, n, outputs, offs_o, offs_o < outputs), ())
    y = tl.load(y_ptrs, mask, 0.0).to(tl.float32)
    return tl.where(mask, norm_backward(grad, centre(y, norm), norm, drift), 0.0).to(DTYPE)


@triton.jit
def store_out(
    out, x, out_ptrs, sums_ptr, part, parts, channels, offs_c, mask, mask_c, norm, var_ptr, eps,
    ACT: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    """The gradient of h * gate in a tile, and its sums with h, its slope and xhat, of what is stored."""
    out = out.to(x.dtype)
    tl.store(out_ptrs, out, mask)
    if sums_ptr is not None:
        grad = tl.where(mask, out.to(tl.float32), 0.0)
        centred = centre(x.to(tl.float32), norm)
        h, slope = activate_with_slope(affine(centred, norm), ACT)
        of_xhat = sum_of_products(grad * slope, centred, PIXEL_AXIS)
        of_xhat *= load_inverse_deviation(var_ptr, eps, offs_c, mask_c)
        ptrs = sums_ptr + tl.cast(part, tl.int64) * channels + offs_c
        stride = tl.cast(parts, tl.int64) * channels
        tl.store(ptrs, sum_of_products(grad, h, PIXEL_AXIS), mask_c)
        tl.store(ptrs + stride, sum_of_products(grad, slope, PIXEL_AXIS), mask_c)
        tl.store(ptrs + 2 * stride, of_xhat, mask_c)


@triton.jit(do_not_specialize=["tiles", "parts"])
def pointwise_backward_input_kernel(
    grad_ptr, scale_ptr, y_ptr, mean2_ptr, var2_ptr, gamma2_ptr, eps2, means_ptr, w_ptr,
    x_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, out_ptr, sums_ptr,
    channels, outputs, area, width, tiles, parts,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, out_stride_n, out_stride_c, out_stride_h, out_stride_w,
    ACT: tl.constexpr, ONE_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of BLOCK_P pixels of an image, from all outputs."""
    offs_c, part = channel_block(channels, 8, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    n = tl.cast(part // tiles, tl.int64)
    pixels = tl.expand_dims(part % tiles * BLOCK_P + tl.arange(0, BLOCK_P), 1 - PIXEL_AXIS)
    mask_p = pixels < area
    out = tl.zeros((BLOCK_P, BLOCK_C) if PIXEL_AXIS == 0 else (BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, outputs, BLOCK_O):
        block = start + tl.arange(0, BLOCK_O)
        offs_o = tl.expand_dims(block, PIXEL_AXIS)
        norm2 = load_norm(mean2_ptr, var2_ptr, gamma2_ptr, None, eps2, offs_o, offs_o < outputs)
        drift = load_drift(means_ptr, var2_ptr, eps2, outputs, offs_o, offs_o < outputs)
        dy = load_grad(
            grad_ptr, y_ptr, scale_ptr, n, pixels, offs_o, mask_p & (offs_o < outputs), outputs, width, norm2, drift,
            grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
            ONE_ROW, x_ptr.dtype.element_ty,
        )  # fmt: skip
        w_block = tl.expand_dims(block, 1 - PIXEL_AXIS)
        w = tl.load(w_ptr + w_block * channels + offs_c, (w_block < outputs) & mask_c, 0.0)
        if PIXEL_AXIS == 0:
            out = tl.dot(dy, w, out, input_precision=PRECISION)
        else:
            out = tl.dot(w, dy, out, input_precision=PRECISION)
    mask = mask_p & mask_c
    x_ptrs = map_ptrs(x_ptr, n, offs_c, pixels, width, x_stride_n, x_stride_c, x_stride_h, x_stride_w, ONE_ROW)
    x = tl.load(x_ptrs, mask, 0.0)
    out_ptrs = map_ptrs(
        out_ptr, n, offs_c, pixels, width, out_stride_n, out_stride_c, out_stride_h, out_stride_w, ONE_ROW
    )  # fmt: skip
    norm1 = load_norm(mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, offs_c, mask_c)
    store_out(
        out, x, out_ptrs, sums_ptr, part, parts, channels, offs_c, mask, mask_c, norm1, var1_ptr, eps1, ACT, PIXEL_AXIS
    )


@triton.jit(do_not_specialize=["tiles", "parts", "steps"])
def pointwise_backward_weight_kernel(
    grad_ptr, scale_ptr, y_ptr, mean2_ptr, var2_ptr, gamma2_ptr, eps2, means_ptr, w_ptr,
    x_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, gate_ptr, out_ptr, sums_ptr, weights_ptr,
    channels, outputs, area, width, tiles, parts, steps,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, out_stride_n, out_stride_c, out_stride_h, out_stride_w,
    ACT: tl.constexpr, ONE_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    """The weight gradient of BLOCK_C channels and BLOCK_O outputs, from `steps` of the `parts` tiles of BLOCK_P pixels.

    With an out_ptr, for which BLOCK_O must hold all outputs, the gradient of h * gate too, while the tile is at hand.
    """
    offs_c, share = channel_block(channels, 8, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    block = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_o = tl.expand_dims(block, PIXEL_AXIS)
    mask_o = offs_o < outputs
    norm1 = load_norm(mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, offs_c, mask_c)
    norm2 = load_norm(mean2_ptr, var2_ptr, gamma2_ptr, None, eps2, offs_o, mask_o)
    drift = load_drift(means_ptr, var2_ptr, eps2, outputs, offs_o, mask_o)
    across = tl.expand_dims(block, 1 - PIXEL_AXIS)
    if out_ptr is not None:
        w = tl.load(w_ptr + across * channels + offs_c, (across < outputs) & mask_c, 0.0)
    grad_weight = tl.zeros((BLOCK_C, BLOCK_O), tl.float32)
    for part in range(share * steps, tl.minimum((share + 1) * steps, parts)):
        n = tl.cast(part // tiles, tl.int64)
        pixels = tl.expand_dims(part % tiles * BLOCK_P + tl.arange(0, BLOCK_P), 1 - PIXEL_AXIS)
        mask_p = pixels < area
        mask = mask_p & mask_c
        x_ptrs = map_ptrs(x_ptr, n, offs_c, pixels, width, x_stride_n, x_stride_c, x_stride_h, x_stride_w, ONE_ROW)
        x = tl.load(x_ptrs, mask, 0.0)
        dy = load_grad(
            grad_ptr, y_ptr, scale_ptr, n, pixels, offs_o, mask_p & mask_o, outputs, width, norm2, drift,
            grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
            ONE_ROW, x_ptr.dtype.element_ty,
        )  # fmt: skip
        gate = load_per_image(gate_ptr, n, channels, offs_c, mask_c)
        # Beyond the map dy is zero, but h of a zero may be infinite.
        h = tl.where(mask_p, scale_shift(norm_act(x.to(tl.float32), norm1, ACT), gate, ()), 0.0).to(x.dtype)
        if PIXEL_AXIS == 0:
            grad_weight = tl.dot(tl.trans(h), dy, grad_weight, input_precision=PRECISION)
        else:
            grad_weight = tl.dot(h, tl.trans(dy), grad_weight, input_precision=PRECISION)
        if out_ptr is not None:
            if PIXEL_AXIS == 0:
                out = tl.dot(dy, w, input_precision=PRECISION)
            else:
                out = tl.dot(w, dy, input_precision=PRECISION)
            out_ptrs = map_ptrs(
                out_ptr, n, offs_c, pixels, width, out_stride_n, out_stride_c, out_stride_h, out_stride_w, ONE_ROW
            )  # fmt: skip
            store_out(
                out, x, out_ptrs, sums_ptr, part, parts, channels, offs_c, mask, mask_c, norm1, var1_ptr, eps1,
                ACT, PIXEL_AXIS,
            )  # fmt: skip
    rows = (tl.program_id(0) % tl.cdiv(channels, BLOCK_C)).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    columns = block[None, :]
    ptrs = weights_ptr + tl.cast(share, tl.int64) * outputs * channels + columns * channels + rows
    tl.store(ptrs, grad_weight, (rows < channels) & (columns < outputs))


def pointwise_backward(
    grad: Tensor, scale: Tensor | None, y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, eps2: float,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    eps1: float, act1: int, gate: Tensor | None, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, channels, height, width), outputs = x.shape, weight.shape[0]
    area = height * width
    wide = is_multiplied_on_ordinary_units(x)
    axis = pixel_axis(x)
    # Both gradients in one launch where that of the weights fits the registers; otherwise x and dy are read twice.
    fused = need_input and need_weight and outputs <= (32 if wide else 64)
    block_p = tile_size(area, 16 if wide else 64 if axis == 0 and not fused else 32)
    block_c = tile_size(channels, 32 if wide else 64)
    blocks_c, tiles = triton.cdiv(channels, block_c), triton.cdiv(area, block_p)
    parts = batch * tiles

    empty = x.new_empty(0, dtype=torch.float32)
    out = empty_map(x, x.shape) if need_input else None
    sums = x.new_empty((3, parts, channels), dtype=torch.float32) if need_input and mean1 is not None else None
    of_y = grad, *dense(scale), y, *dense(mean2, var2, gamma2), eps2, *dense(grad_means, weight)
    of_x = x, *dense(mean1, var1, gamma1, beta1), eps1
    common = dict(
        ACT=act1, ONE_ROW=all(map(is_one_row, (grad, y, x))), PRECISION=precision(), BLOCK_P=block_p, BLOCK_C=block_c,
        PIXEL_AXIS=axis, num_warps=8, maxnreg=REGISTERS,
    )  # fmt: skip
    strides_of_maps = *grad.stride(), *y.stride(), *x.stride(), *strides(out)
    if batch and need_input and not fused:
        pointwise_backward_input_kernel[(parts * blocks_c,)](
            *of_y, *of_x, out, sums, channels, outputs, area, width, tiles, parts, *strides_of_maps,
            BLOCK_O=tile_size(outputs, 16 if wide else 32), **common,
        )  # fmt: skip
    weights = None
    if need_weight:
        block_o = tile_size(outputs, 64)
        blocks_o = triton.cdiv(outputs, block_o)
        steps = triton.cdiv(parts * blocks_c * blocks_o, PROGRAMS)
        shares = triton.cdiv(parts, max(steps, 1))
        weights = x.new_empty((shares, outputs, channels), dtype=torch.float32)
        if batch:
            pointwise_backward_weight_kernel[(shares * blocks_c, blocks_o)](
                *of_y, *of_x, *dense(gate), out if fused else None, sums if fused else None, weights,
                channels, outputs, area, width, tiles, parts, steps, *strides_of_maps,
                BLOCK_O=block_o, **common,
            )  # fmt: skip
    return (
        x.new_empty(0) if out is None else out,
        empty if sums is None else sums_per_image(sums, batch),
        empty if weights is None else weights.sum(0),
    )
