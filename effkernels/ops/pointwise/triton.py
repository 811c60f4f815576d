"""The 1x1 convolution and its backward in Triton, as matrix products over the pixels of an image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._triton import (
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
    reduce_add,
    reduce_start,
    reduce_store,
    scale_shift,
    strides,
    sum_of_products,
    sums_per_image,
)

PROGRAMS = 512  # of backward, a few for each multiprocessor: each adds up a weight gradient of its own


@triton.jit
def pixel_offsets(pixels, width, stride_h, stride_w, ONE_ROW: tl.constexpr):
    if ONE_ROW:
        offsets = pixels.to(tl.int64) * stride_w
    else:
        offsets = (pixels // width).to(tl.int64) * stride_h + (pixels % width).to(tl.int64) * stride_w
    return offsets


@triton.jit
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
    x_ptrs = x_ptr + n * x_stride_n + pixel_offsets(pixels, width, x_stride_h, x_stride_w, ONE_ROW)

    y = tl.zeros((BLOCK_P, BLOCK_O) if PIXEL_AXIS == 0 else (BLOCK_O, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_C):
        block = start + tl.arange(0, BLOCK_C)
        offs_c = tl.expand_dims(block, PIXEL_AXIS)
        mask_c = offs_c < channels
        x = tl.load(x_ptrs + offs_c.to(tl.int64) * x_stride_c, mask_p & mask_c, 0.0)
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
        ptrs = residual_ptr + n * residual_stride_n + offs_o * residual_stride_c
        ptrs += pixel_offsets(pixels, width, residual_stride_h, residual_stride_w, ONE_ROW)
        y += tl.load(ptrs, mask_p & mask_o, 0.0).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    y_ptrs = y_ptr + n * y_stride_n + offs_o * y_stride_c
    tl.store(y_ptrs + pixel_offsets(pixels, width, y_stride_h, y_stride_w, ONE_ROW), y, mask_p & mask_o)
    state = reduce_start(tl.zeros_like(y).to(tl.float32), pixels, REDUCE)
    state = reduce_add(state, y, mask_p, REDUCE)
    reduce_store(state, parts_ptr, part, outputs, offs_o, mask_o, share, PIXEL_AXIS, REDUCE)


def precision() -> str:
    """Of products of float32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


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
    wide = x.dtype == torch.float32  # multiplied on the ordinary units, from registers
    block_p, block_o = tile_size(area, 64 if wide else 128), tile_size(outputs, 64 if wide else 128)
    tiles = triton.cdiv(area, block_p)
    parts = empty_parts(y, batch * tiles, reduce)
    if batch:
        pointwise_kernel[(batch * tiles * triton.cdiv(outputs, block_o),)](
            x, weight.contiguous(), y, parts, *dense(mean, var, gamma, beta), eps, *dense(gate, bias), residual,
            channels, outputs, area, width, tiles, 1 / area, *x.stride(), *y.stride(), *strides(residual),
            ACT=act, REDUCE=reduce, ONE_ROW=all(t is None or is_one_row(t) for t in (x, y, residual)),
            PRECISION=precision(), BLOCK_P=block_p, BLOCK_O=block_o, BLOCK_C=tile_size(channels, 16 if wide else 32),
            PIXEL_AXIS=pixel_axis(x), num_warps=8 if block_p * block_o >= 64 * 64 else 4,
        )  # fmt: skip
    return y, finish(parts, batch, reduce)


@triton.jit
def load_grad(
    grad_ptrs, y_ptrs, scale_ptr, mean_ptr, var_ptr, gamma_ptr, eps, means_ptr, n, outputs, offs_o, mask_p,
    grad_stride_c, y_stride_c, DTYPE: tl.constexpr,
):  # fmt: skip
    """dy of some outputs; zero beyond the map."""
    mask_o = offs_o < outputs
    mask = mask_p & mask_o
    grad = tl.load(grad_ptrs + offs_o.to(tl.int64) * grad_stride_c, mask, 0.0).to(tl.float32)
    grad = scale_shift(grad, load_per_image(scale_ptr, n, outputs, offs_o, mask_o), ())
    norm = load_norm(mean_ptr, var_ptr, gamma_ptr, None, eps, offs_o, mask_o)
    drift = load_drift(means_ptr, var_ptr, eps, outputs, offs_o, mask_o)
    y = tl.load(y_ptrs + offs_o.to(tl.int64) * y_stride_c, mask, 0.0).to(tl.float32)
    return tl.where(mask, norm_backward(grad, centre(y, norm), norm, drift), 0.0).to(DTYPE)


@triton.jit
def pointwise_backward_kernel(
    grad_ptr, scale_ptr, y_ptr, mean2_ptr, var2_ptr, gamma2_ptr, eps2, means_ptr, w_ptr,
    x_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, gate_ptr, out_ptr, sums_ptr, weights_ptr,
    batch, channels, outputs, area, width, images, splits, steps,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, out_stride_n, out_stride_c, out_stride_h, out_stride_w,
    ACT: tl.constexpr, WEIGHT_BLOCKS: tl.constexpr, ONE_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of `images` images, or of a split of one, BLOCK_P pixels at a time.

    With weights_ptr, the weight gradient of WEIGHT_BLOCKS blocks of outputs is added up in registers: all blocks where
    there is an out_ptr. Without, the outputs are walked through.
    """
    offs_c, part = channel_block(channels, 8, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    first_o = tl.program_id(1) * WEIGHT_BLOCKS * BLOCK_O
    first_n = part // splits * images
    first = part % splits * steps
    norm = load_norm(mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, offs_c, mask_c)
    inverse_deviation = load_inverse_deviation(var1_ptr, eps1, offs_c, mask_c)
    w_shape: tl.constexpr = (BLOCK_O, BLOCK_C) if PIXEL_AXIS == 0 else (BLOCK_C, BLOCK_O)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    grad_weights = ()
    if weights_ptr is not None:
        for _ in tl.static_range(WEIGHT_BLOCKS):
            grad_weights = grad_weights + (tl.zeros(w_shape, tl.float32),)

    for image in range(first_n, tl.minimum(first_n + images, batch)):
        n = tl.cast(image, tl.int64)
        gate = load_per_image(gate_ptr, n, channels, offs_c, mask_c)
        of_h = tl.zeros_like(inverse_deviation)
        of_slope = of_h
        of_xhat = of_h
        # Prefetching the next tiles too would spill registers.
        for step in tl.range(first, first + steps, num_stages=1):
            pixels = tl.expand_dims(step * BLOCK_P + tl.arange(0, BLOCK_P), 1 - PIXEL_AXIS)
            mask_p = pixels < area
            mask = mask_p & mask_c
            x_offsets = pixel_offsets(pixels, width, x_stride_h, x_stride_w, ONE_ROW)
            x = tl.load(x_ptr + n * x_stride_n + offs_c * x_stride_c + x_offsets, mask, 0.0).to(tl.float32)
            centred = centre(x, norm)
            h, slope = activate_with_slope(affine(centred, norm), ACT)
            gated = scale_shift(h, gate, ()).to(dtype)
            grad_offsets = pixel_offsets(pixels, width, grad_stride_h, grad_stride_w, ONE_ROW)
            grad_ptrs = grad_ptr + n * grad_stride_n + grad_offsets
            y_ptrs = y_ptr + n * y_stride_n + pixel_offsets(pixels, width, y_stride_h, y_stride_w, ONE_ROW)
            out = tl.zeros(x.shape, tl.float32)
            if weights_ptr is None:
                for start in range(0, outputs, BLOCK_O):
                    block = start + tl.arange(0, BLOCK_O)
                    dy = load_grad(
                        grad_ptrs, y_ptrs, scale_ptr, mean2_ptr, var2_ptr, gamma2_ptr, eps2, means_ptr, n, outputs,
                        tl.expand_dims(block, PIXEL_AXIS), mask_p, grad_stride_c, y_stride_c, dtype,
                    )  # fmt: skip
                    out = input_product(dy, out, w_ptr, block, outputs, offs_c, channels, PIXEL_AXIS, PRECISION)
            else:
                added = ()
                for i in tl.static_range(WEIGHT_BLOCKS):
                    block = first_o + i * BLOCK_O + tl.arange(0, BLOCK_O)
                    dy = load_grad(
                        grad_ptrs, y_ptrs, scale_ptr, mean2_ptr, var2_ptr, gamma2_ptr, eps2, means_ptr, n, outputs,
                        tl.expand_dims(block, PIXEL_AXIS), mask_p, grad_stride_c, y_stride_c, dtype,
                    )  # fmt: skip
                    if PIXEL_AXIS == 0:
                        grad_weight = tl.dot(tl.trans(dy), gated, grad_weights[i], input_precision=PRECISION)
                    else:
                        grad_weight = tl.dot(gated, tl.trans(dy), grad_weights[i], input_precision=PRECISION)
                    added = added + (grad_weight,)
                    if out_ptr is not None:
                        out = input_product(dy, out, w_ptr, block, outputs, offs_c, channels, PIXEL_AXIS, PRECISION)
                grad_weights = added
            if out_ptr is not None:
                stored = out.to(dtype)
                out_offsets = pixel_offsets(pixels, width, out_stride_h, out_stride_w, ONE_ROW)
                tl.store(out_ptr + n * out_stride_n + offs_c * out_stride_c + out_offsets, stored, mask)
                out = tl.where(mask, stored.to(tl.float32), 0.0)
                of_h += sum_of_products(out, h, PIXEL_AXIS)
                of_slope += sum_of_products(out, slope, PIXEL_AXIS)
                of_xhat += sum_of_products(out * slope, centred, PIXEL_AXIS) * inverse_deviation
        if out_ptr is not None:
            ptrs = sums_ptr + (n * splits + part % splits) * channels + offs_c
            sums_stride = tl.cast(batch, tl.int64) * splits * channels
            tl.store(ptrs, of_h, mask_c)
            tl.store(ptrs + sums_stride, of_slope, mask_c)
            tl.store(ptrs + 2 * sums_stride, of_xhat, mask_c)

    for i in tl.static_range(len(grad_weights)):
        offs_o = tl.expand_dims(first_o + i * BLOCK_O + tl.arange(0, BLOCK_O), 1 - PIXEL_AXIS)
        ptrs = weights_ptr + part.to(tl.int64) * outputs * channels + offs_o * channels + offs_c
        tl.store(ptrs, grad_weights[i], (offs_o < outputs) & mask_c)


@triton.jit
def input_product(
    dy, out, w_ptr, block, outputs, offs_c, channels, PIXEL_AXIS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add the part of weight^T dy that the outputs `block` make."""
    offs_o = tl.expand_dims(block, 1 - PIXEL_AXIS)
    w = tl.load(w_ptr + offs_o * channels + offs_c, (offs_o < outputs) & (offs_c < channels), 0.0)
    if PIXEL_AXIS == 0:
        out = tl.dot(dy, w, out, input_precision=PRECISION)
    else:
        out = tl.dot(w, dy, out, input_precision=PRECISION)
    return out


def pointwise_backward(
    grad: Tensor, scale: Tensor | None, y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, eps2: float,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, mean1: Tensor, var1: Tensor, gamma1: Tensor | None, beta1: Tensor | None, eps1: float, act1: int,
    gate: Tensor | None, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, channels, height, width), outputs = x.shape, weight.shape[0]
    area = height * width
    wide = x.dtype == torch.float32
    limits = (16, 32, 16) if wide else (32, 32, 32)
    block_p, block_c, block_o = map(tile_size, (area, channels, outputs), limits)
    blocks_c, blocks_o, tiles = (
        triton.cdiv(channels, block_c), triton.cdiv(outputs, block_o), triton.cdiv(area, block_p)
    )  # fmt: skip
    # Programs that each keep a weight gradient are few; of the others each takes one tile.
    wanted = triton.cdiv(PROGRAMS, blocks_c) if need_weight else batch * tiles
    images = triton.cdiv(batch, wanted)
    steps = triton.cdiv(tiles, max(wanted // max(batch, 1), 1))
    splits, groups = triton.cdiv(tiles, steps), triton.cdiv(batch, max(images, 1))

    out = empty_map(x, x.shape) if need_input else None
    sums = x.new_empty((3, batch * splits, channels) if need_input else (0,), dtype=torch.float32)
    weights = x.new_empty((groups * splits, outputs, channels), dtype=torch.float32) if need_weight else None

    def launch(out: Tensor | None, weights: Tensor | None, weight_blocks: int) -> None:
        rounds = triton.cdiv(blocks_o, weight_blocks) if weight_blocks else 1
        pointwise_backward_kernel[(groups * splits * blocks_c, rounds)](
            grad, *dense(scale), y, *dense(mean2, var2, gamma2), eps2, *dense(grad_means, weight),
            x, *dense(mean1, var1, gamma1, beta1), eps1, *dense(gate), out, sums, weights,
            batch, channels, outputs, area, width, images, splits, steps,
            *grad.stride(), *y.stride(), *x.stride(), *strides(out),
            ACT=act1, WEIGHT_BLOCKS=weight_blocks, ONE_ROW=all(map(is_one_row, (grad, y, x))),
            PRECISION=precision(), BLOCK_P=block_p, BLOCK_O=block_o, BLOCK_C=block_c, PIXEL_AXIS=pixel_axis(x),
            num_warps=4 if wide and weights is None else 8,
        )  # fmt: skip

    if batch:
        most = 2 if wide else 3  # blocks of outputs whose weight gradients fit registers
        if need_weight and blocks_o <= most:
            launch(out, weights, blocks_o)
        else:
            # Where the weight gradient does not fit, x and dy are read twice.
            if need_input:
                launch(out, None, 0)
            if need_weight:
                launch(None, weights, most)
    return (
        x.new_empty(0) if out is None else out,
        sums_per_image(sums, batch) if need_input else sums,
        x.new_empty(0, dtype=torch.float32) if weights is None else weights.sum(0),
    )
