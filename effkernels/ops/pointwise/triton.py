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


def has_tensor_cores() -> bool:
    """Whether `tl.dot` uses them for 16 bits: Triton does from sm_80 on."""
    return bool(triton.knobs.runtime.interpret) or triton.runtime.driver.active.get_current_target().arch >= 80


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
    wide = x.dtype == torch.float32 or not has_tensor_cores()  # multiplied on the ordinary units, from registers
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
def turned(tile, PIXEL_AXIS: tl.constexpr):
    """Between the layout of the map's tiles and [channels, pixels], that of the products."""
    return tl.trans(tile) if PIXEL_AXIS == 0 else tile


@triton.jit(do_not_specialize=["batch", "images", "splits", "steps"])
def pointwise_backward_kernel(
    grad_ptr, scale_ptr, y_ptr, mean2_ptr, var2_ptr, gamma2_ptr, eps2, means_ptr, w_ptr,
    x_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, gate_ptr, out_ptr, sums_ptr, weights_ptr,
    batch, channels, outputs, area, width, images, splits, steps,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, out_stride_n, out_stride_c, out_stride_h, out_stride_w,
    ACT: tl.constexpr, ONE_ROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of `images` images, or of a split of one, BLOCK_P pixels at a time.

    With weights_ptr, the weight gradient of BLOCK_O outputs is added up in registers: of all outputs where there is an
    out_ptr. Without, the outputs are walked through. The rows of both products are channels: where products share
    an operand, Triton divides only their rows among the warps.
    """
    offs_c, part = channel_block(channels, 8, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    first_o = tl.program_id(1) * BLOCK_O
    first_n = part // splits * images
    first = part % splits * steps
    norm = load_norm(mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, offs_c, mask_c)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    grad_weight = tl.zeros((BLOCK_C, BLOCK_O), tl.float32)

    for image in range(first_n, tl.minimum(first_n + images, batch)):
        n = tl.cast(image, tl.int64)
        gate = load_per_image(gate_ptr, n, channels, offs_c, mask_c)
        of_h = tl.zeros_like(norm[0])
        of_slope = of_h
        of_centred = of_h
        # Prefetching the next tiles too would spill registers.
        for step in tl.range(first, first + steps, num_stages=1):
            pixels = tl.expand_dims(step * BLOCK_P + tl.arange(0, BLOCK_P), 1 - PIXEL_AXIS)
            mask_p = pixels < area
            mask = mask_p & mask_c
            x_ptrs = x_ptr + n * x_stride_n + offs_c * x_stride_c
            x_ptrs += pixel_offsets(pixels, width, x_stride_h, x_stride_w, ONE_ROW)
            grad_ptrs = grad_ptr + n * grad_stride_n
            grad_ptrs += pixel_offsets(pixels, width, grad_stride_h, grad_stride_w, ONE_ROW)
            y_ptrs = y_ptr + n * y_stride_n + pixel_offsets(pixels, width, y_stride_h, y_stride_w, ONE_ROW)
            out = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
            for start in range(first_o, first_o + BLOCK_O if weights_ptr is not None else outputs, BLOCK_O):
                block = start + tl.arange(0, BLOCK_O)
                dy = load_grad(
                    grad_ptrs, y_ptrs, scale_ptr, mean2_ptr, var2_ptr, gamma2_ptr, eps2, means_ptr, n, outputs,
                    tl.expand_dims(block, PIXEL_AXIS), mask_p, grad_stride_c, y_stride_c, dtype,
                )  # fmt: skip
                if weights_ptr is not None:
                    h = norm_act(tl.load(x_ptrs, mask, 0.0).to(tl.float32), norm, ACT)
                    gated = turned(scale_shift(h, gate, ()).to(dtype), PIXEL_AXIS)
                    across = turned(dy, 1 - PIXEL_AXIS)
                    grad_weight = tl.dot(gated, across, grad_weight, input_precision=PRECISION)
                if out_ptr is not None:
                    offs_o = tl.expand_dims(block, 1 - PIXEL_AXIS)
                    w = tl.load(w_ptr + offs_o * channels + offs_c, (offs_o < outputs) & mask_c, 0.0)
                    out = tl.dot(turned(w, PIXEL_AXIS), turned(dy, PIXEL_AXIS), out, input_precision=PRECISION)
            if out_ptr is not None:
                stored = turned(out.to(dtype), PIXEL_AXIS)
                out_ptrs = out_ptr + n * out_stride_n + offs_c * out_stride_c
                out_ptrs += pixel_offsets(pixels, width, out_stride_h, out_stride_w, ONE_ROW)
                tl.store(out_ptrs, stored, mask)
                grad = tl.where(mask, stored.to(tl.float32), 0.0)
                # x comes from the cache: kept during the products, it would spill.
                centred = centre(tl.load(x_ptrs, mask, 0.0).to(tl.float32), norm)
                h, slope = activate_with_slope(affine(centred, norm), ACT)
                of_h += sum_of_products(grad, h, PIXEL_AXIS)
                of_slope += sum_of_products(grad, slope, PIXEL_AXIS)
                of_centred += sum_of_products(grad * slope, centred, PIXEL_AXIS)
        if out_ptr is not None:
            ptrs = sums_ptr + (n * splits + part % splits) * channels + offs_c
            sums_stride = tl.cast(batch, tl.int64) * splits * channels
            tl.store(ptrs, of_h, mask_c)
            tl.store(ptrs + sums_stride, of_slope, mask_c)
            of_xhat = of_centred * load_inverse_deviation(var1_ptr, eps1, offs_c, mask_c)
            tl.store(ptrs + 2 * sums_stride, of_xhat, mask_c)

    if weights_ptr is not None:
        offs_o = tl.expand_dims(first_o + tl.arange(0, BLOCK_O), 1 - PIXEL_AXIS)
        ptrs = weights_ptr + part.to(tl.int64) * outputs * channels + offs_o * channels + offs_c
        tl.store(ptrs, turned(grad_weight, PIXEL_AXIS), (offs_o < outputs) & mask_c)


def pointwise_backward(
    grad: Tensor, scale: Tensor | None, y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, eps2: float,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    eps1: float, act1: int, gate: Tensor | None, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, channels, height, width), outputs = x.shape, weight.shape[0]
    need_sums = need_input and mean1 is not None
    if mean1 is None or var1 is None:  # one kernel for both: it normalises by nothing
        mean1, var1 = x.new_zeros(channels, dtype=torch.float32), x.new_ones(channels, dtype=torch.float32)
    area = height * width
    # Both gradients in one launch where that of the weights fits the registers; otherwise x and dy are read twice.
    fused = need_input and need_weight and outputs <= 32
    block_p = tile_size(area, 16)
    block_c = tile_size(channels, 32 if fused or x.dtype == torch.float32 else 64)
    blocks_c, tiles = triton.cdiv(channels, block_c), triton.cdiv(area, block_p)
    # Programs that each keep a weight gradient are few; of the others each takes one tile.
    wanted = triton.cdiv(PROGRAMS, blocks_c) if need_weight else batch * tiles
    images = triton.cdiv(batch, wanted)
    steps = triton.cdiv(tiles, max(wanted // max(batch, 1), 1))
    splits, groups = triton.cdiv(tiles, steps), triton.cdiv(batch, max(images, 1))

    out = empty_map(x, x.shape) if need_input else None
    sums = x.new_empty((3, batch * splits, channels) if need_input else (0,), dtype=torch.float32)
    weights = x.new_empty((groups * splits, outputs, channels), dtype=torch.float32) if need_weight else None

    def launch(out: Tensor | None, weights: Tensor | None, block_o: int) -> None:
        rounds = 1 if weights is None else triton.cdiv(outputs, block_o)
        pointwise_backward_kernel[(groups * splits * blocks_c, rounds)](
            grad, *dense(scale), y, *dense(mean2, var2, gamma2), eps2, *dense(grad_means, weight),
            x, *dense(mean1, var1, gamma1, beta1), eps1, *dense(gate), out, sums, weights,
            batch, channels, outputs, area, width, images, splits, steps,
            *grad.stride(), *y.stride(), *x.stride(), *strides(out),
            ACT=act1, ONE_ROW=all(map(is_one_row, (grad, y, x))), PRECISION=precision(),
            BLOCK_P=block_p, BLOCK_O=block_o, BLOCK_C=block_c, PIXEL_AXIS=pixel_axis(x),
            num_warps=8, maxnreg=REGISTERS,
        )  # fmt: skip

    if batch and fused:
        launch(out, weights, tile_size(outputs, 32))
    elif batch:
        if need_input:
            launch(out, None, tile_size(outputs, 16 if x.dtype == torch.float32 else 32))
        if need_weight:
            launch(None, weights, tile_size(outputs, 64))
    return (
        x.new_empty(0) if out is None else out,
        sums_per_image(sums, batch) if need_sums else x.new_empty(0, dtype=torch.float32),
        x.new_empty(0, dtype=torch.float32) if weights is None else weights.sum(0),
    )
