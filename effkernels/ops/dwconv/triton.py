"""The depthwise convolution and its backward in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._triton import (
    REGISTERS,
    activate_with_slope,
    affine,
    block,
    centre,
    channel_block,
    dense,
    empty_parts,
    finish,
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
    sums_add,
    sums_start,
    sums_store,
)

WARPS = 4096  # about twice what fits a large GPU at these kernels' register counts: beyond that, bands get higher


@triton.jit
def dwconv_kernel(
    x_ptr, w_ptr, y_ptr, parts_ptr,
    mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, eps2,
    channels, height, width, out_h, out_w, pad_top, pad_left, bands, band_rows, share,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    K: tl.constexpr, STRIDE: tl.constexpr, ACT1: tl.constexpr, ACT2: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A band of output rows, BLOCK_W columns of it, BLOCK_C channels.

    Input rows are visited once, top to bottom. Each adds to the OPEN output rows that its window covers, held in
    registers: K loads an output and input row, not K * K. The columns of the window are loaded (from L1) one by one,
    as a tile cannot be shifted: a prologue is computed K times, not once.
    """
    OPEN: tl.constexpr = (K + STRIDE - 1) // STRIDE
    # A thread keeps K * K weights for each of its channels: VECTOR is small.
    offs_c, part = channel_block(channels, VECTOR, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    blocks_w = tl.cdiv(out_w, BLOCK_W)
    out_col = tl.expand_dims(part % blocks_w * BLOCK_W + tl.arange(0, BLOCK_W), 1 - PIXEL_AXIS)
    first = part // blocks_w % bands * band_rows
    last = tl.minimum(first + band_rows, out_h)
    n = (part // blocks_w // bands).to(tl.int64)
    col = out_col * STRIDE - pad_left
    row_end = tl.minimum((last - 1) * STRIDE - pad_top + K, height)
    x_ptrs = x_ptr + n * x_stride_n + offs_c * x_stride_c + col.to(tl.int64) * x_stride_w
    y_ptrs = y_ptr + n * y_stride_n + offs_c * y_stride_c + out_col.to(tl.int64) * y_stride_w

    norm1 = load_norm(mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, offs_c, mask_c)
    norm2 = load_norm(mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, eps2, offs_c, mask_c)
    weights = ()
    for tap in tl.static_range(K * K):
        weights = weights + (tl.load(w_ptr + offs_c * (K * K) + tap, mask_c, 0.0).to(tl.float32),)
    zeros = tl.zeros((BLOCK_W, BLOCK_C) if PIXEL_AXIS == 0 else (BLOCK_C, BLOCK_W), tl.float32)
    rows = ()
    for _ in tl.static_range(OPEN):
        rows = rows + (zeros,)
    state = reduce_start(zeros, out_col, REDUCE)

    for step in range(first, last + OPEN - 1):
        for j in tl.static_range(STRIDE):
            row = step * STRIDE + j - pad_top
            row_ptrs = x_ptrs + tl.cast(row, tl.int64) * x_stride_h
            for kx in tl.static_range(K):
                mask = (row >= 0) & (row < row_end) & (col >= -kx) & (col < width - kx) & mask_c
                x = tl.load(row_ptrs + kx * x_stride_w, mask, 0.0).to(tl.float32)
                if len(norm1) > 0 or ACT1 != 0:
                    x = tl.where(mask, norm_act(x, norm1, ACT1), 0.0)
                updated = ()
                for i in tl.static_range(OPEN):
                    if (OPEN - 1 - i) * STRIDE + j < K:
                        updated = updated + (rows[i] + x * weights[((OPEN - 1 - i) * STRIDE + j) * K + kx],)
                    else:
                        updated = updated + (rows[i],)
                rows = updated
        out_row = step - (OPEN - 1)
        if out_row >= first:
            y = norm_act(rows[0], norm2, ACT2).to(y_ptr.dtype.element_ty)  # type: ignore[misc]
            tl.store(y_ptrs + tl.cast(out_row, tl.int64) * y_stride_h, y, (out_col < out_w) & mask_c)
            state = reduce_add(state, y, out_col < out_w, REDUCE)
        rows = rows[1:] + (zeros,)
    reduce_store(state, parts_ptr, part, channels, offs_c, mask_c, share, PIXEL_AXIS, REDUCE)


def tile(x: Tensor, k: int, stride: int, out_w: int) -> dict[str, int]:
    """Columns and channels of a program, and its warps, such that no instance spills registers."""
    axis = pixel_axis(x)
    if axis == 0:
        # A thread holds 8 outputs of each row that is open, or 4, or 2, beside its weights.
        size = 1024 if k == 3 and stride == 1 else 256 if k == 5 and stride == 2 else 512
        block_w = block(out_w, size // 32, 8)
        block_c = block(x.shape[1], min(size // block_w, 64), 16)
        warps = 8 if k == 7 and stride == 2 else 4
    else:
        # Whole rows where they fit; one warp, so that its lanes run along a row and share channels.
        block_w = block(out_w, 128, 16)
        block_c = min((1 if k == 7 else 2) * max(32 // block_w, 1), triton.next_power_of_2(x.shape[1]))
        warps = 1
    return dict(BLOCK_W=block_w, BLOCK_C=block_c, PIXEL_AXIS=axis, VECTOR=2, num_warps=warps)


def band(out_h: int, open_rows: int, warps: int) -> int:
    """Output rows of a program, where a band as high as the map would make `warps` warps."""
    # The rows above a band are read again, and outputs of the band above begun in vain: it is twice as high or more.
    rows = max(triton.cdiv(out_h * warps, WARPS), 2 * (open_rows - 1))
    return triton.cdiv(out_h, triton.cdiv(out_h, rows))


def dwconv(
    x: Tensor, weight: Tensor,
    mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None, eps1: float, act1: int,
    mean2: Tensor | None, var2: Tensor | None, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int, reduce: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, channels, height, width = x.shape
    k = weight.shape[2]
    y = empty_map(x, (batch, channels, out_h, out_w))
    shape = tile(x, k, stride, out_w)
    blocks_w, blocks_c = triton.cdiv(out_w, shape["BLOCK_W"]), triton.cdiv(channels, shape["BLOCK_C"])
    band_rows = band(out_h, triton.cdiv(k, stride), batch * blocks_w * blocks_c * shape["num_warps"])
    bands = triton.cdiv(out_h, band_rows)
    parts = empty_parts(x, batch * bands * blocks_w, reduce)
    if batch:
        dwconv_kernel[(batch * bands * blocks_w * blocks_c,)](
            x, weight.contiguous(), y, parts,
            *dense(mean1, var1, gamma1, beta1), eps1, *dense(mean2, var2, gamma2, beta2), eps2,
            channels, height, width, out_h, out_w, pad_top, pad_left, bands, band_rows, 1 / (out_h * out_w),
            *x.stride(), *y.stride(),
            K=k, STRIDE=stride, ACT1=act1, ACT2=act2, REDUCE=reduce, maxnreg=REGISTERS, **shape,
        )  # fmt: skip
    return y, finish(parts, batch, reduce)


@triton.jit
def load_grads(
    grad_ptrs, y_ptrs, scale, shift, norm, drift, row, out_h, col, out_w, mask_c,
    grad_stride_h, grad_stride_w, y_stride_h, y_stride_w,
    COLUMNS: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dy of COLUMNS columns from `col` on; zero beyond the map."""
    grads = ()
    for i in tl.static_range(COLUMNS):
        mask = (row >= 0) & (row < out_h) & (col >= -i) & (col < out_w - i) & mask_c
        grad_offset = tl.cast(row, tl.int64) * grad_stride_h + i * grad_stride_w
        grad = scale_shift(tl.load(grad_ptrs + grad_offset, mask, 0.0).to(tl.float32), scale, shift)
        y = tl.load(y_ptrs + tl.cast(row, tl.int64) * y_stride_h + i * y_stride_w, mask, 0.0).to(tl.float32)
        centred = centre(y, norm)
        grad *= activate_with_slope(affine(centred, norm), ACT)[1]
        grads = grads + (tl.where(mask, norm_backward(grad, centred, norm, drift), 0.0),)
    return grads


@triton.jit
def dwconv_backward_kernel(
    grad_ptr, scale_ptr, shift_ptr, y_ptr, mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, eps2, means_ptr, w_ptr,
    x_ptr, mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, out_ptr, sums_ptr, weights_ptr,
    batch, channels, height, width, out_h, out_w, pad_top, pad_left,
    images, bands, band_steps, blocks_w, first_row, first_col, parts,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, out_stride_n, out_stride_c, out_stride_h, out_stride_w,
    K: tl.constexpr, STRIDE: tl.constexpr, ACT1: tl.constexpr, ACT2: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    """A band of input rows of `images` images; a lane owns COLUMNS adjacent columns of one channel.

    Input rows are visited once, top to bottom. The rows of dy that a window covers are held in registers: each value of
    x and each of dy is activated once, but for the (K - 1) / STRIDE columns of dy beside a lane's own and as many rows
    above a band. Rows and columns are counted from the padding's first, so that an input and an output start together
    at every multiple of STRIDE.
    """
    REACH: tl.constexpr = (K - 1) // STRIDE  # output rows above the current one that an input row belongs to
    OWN: tl.constexpr = COLUMNS // STRIDE
    LOADED: tl.constexpr = OWN + REACH
    offs_c, part = channel_block(channels, 1, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    lanes = tl.expand_dims(part % blocks_w * BLOCK_W + tl.arange(0, BLOCK_W), 1 - PIXEL_AXIS)
    out_col = first_col + lanes * OWN - REACH
    col = (first_col + lanes * OWN) * STRIDE - pad_left
    first = first_row + part // blocks_w % bands * band_steps
    first_n = part // blocks_w // bands * images

    norm1 = load_norm(mean1_ptr, var1_ptr, gamma1_ptr, beta1_ptr, eps1, offs_c, mask_c)
    norm2 = load_norm(mean2_ptr, var2_ptr, gamma2_ptr, beta2_ptr, eps2, offs_c, mask_c)
    drift = load_drift(means_ptr, var2_ptr, eps2, channels, offs_c, mask_c)
    weights = ()
    for tap in tl.static_range(K * K):
        weights = weights + (tl.load(w_ptr + offs_c * (K * K) + tap, mask_c, 0.0).to(tl.float32),)
    zeros = tl.zeros((BLOCK_W, BLOCK_C) if PIXEL_AXIS == 0 else (BLOCK_C, BLOCK_W), tl.float32)
    grad_weights = sums_start(zeros, 0 if weights_ptr is None else K * K)
    sums = sums_start(zeros, 0 if sums_ptr is None else 2)

    for image in range(first_n, tl.minimum(first_n + images, batch)):
        n = tl.cast(image, tl.int64)
        scale = load_per_image(scale_ptr, n, channels, offs_c, mask_c)
        shift = load_per_image(shift_ptr, n, channels, offs_c, mask_c)
        grad_ptrs = grad_ptr + n * grad_stride_n + offs_c * grad_stride_c + out_col.to(tl.int64) * grad_stride_w
        y_ptrs = y_ptr + n * y_stride_n + offs_c * y_stride_c + out_col.to(tl.int64) * y_stride_w
        x_ptrs = x_ptr + n * x_stride_n + offs_c * x_stride_c + col.to(tl.int64) * x_stride_w
        if out_ptr is not None:
            out_ptrs = out_ptr + n * out_stride_n + offs_c * out_stride_c + col.to(tl.int64) * out_stride_w
        grads = sums_start(zeros, REACH * LOADED)
        for step in range(first - REACH, first + band_steps):
            grads = grads + load_grads(
                grad_ptrs, y_ptrs, scale, shift, norm2, drift, step, out_h, out_col, out_w, mask_c,
                grad_stride_h, grad_stride_w, y_stride_h, y_stride_w, LOADED, ACT2,
            )  # fmt: skip
            if step >= first:
                for r in tl.static_range(STRIDE):
                    row = step * STRIDE + r - pad_top
                    for j in tl.static_range(COLUMNS):
                        mask = (row >= 0) & (row < height) & (col >= -j) & (col < width - j) & mask_c
                        x_offset = tl.cast(row, tl.int64) * x_stride_h + j * x_stride_w
                        centred = centre(tl.load(x_ptrs + x_offset, mask, 0.0).to(tl.float32), norm1)
                        h, slope = activate_with_slope(affine(centred, norm1), ACT1)
                        h = tl.where(mask, h, 0.0)
                        out = zeros
                        added = ()
                        for ky in tl.static_range(K):
                            for kx in tl.static_range(K):
                                if ky % STRIDE == r and kx % STRIDE == j % STRIDE:
                                    # Of the output whose tap (ky, kx) is this input.
                                    dy = grads[(REACH - ky // STRIDE) * LOADED + REACH + j // STRIDE - kx // STRIDE]
                                    out += dy * weights[ky * K + kx]
                                    if weights_ptr is not None:
                                        added = added + (grad_weights[ky * K + kx] + dy * h,)
                                elif weights_ptr is not None:
                                    added = added + (grad_weights[ky * K + kx],)
                        grad_weights = added
                        if out_ptr is not None:
                            out = (out * slope).to(x_ptr.dtype.element_ty)
                            out_offset = tl.cast(row, tl.int64) * out_stride_h + j * out_stride_w
                            tl.store(out_ptrs + out_offset, out, mask)
                            dz = out.to(tl.float32)
                            sums = sums_add(sums, (dz, dz * centred), mask)
            grads = grads[LOADED:]

    for tap in tl.static_range(len(grad_weights)):
        ptrs = weights_ptr + (part.to(tl.int64) * channels + offs_c) * (K * K) + tap
        tl.store(ptrs, tl.sum(grad_weights[tap], PIXEL_AXIS, keep_dims=True), mask_c)
    if len(sums) > 0:
        inverse_deviation = load_inverse_deviation(var1_ptr, eps1, offs_c, mask_c)
        of_gamma = tl.sum(sums[1], PIXEL_AXIS, keep_dims=True) * inverse_deviation
        sums_store((sums[0], of_gamma), sums_ptr, part, parts, channels, offs_c, mask_c, PIXEL_AXIS)


def dwconv_backward(
    grad: Tensor, scale: Tensor | None, shift: Tensor | None,
    y: Tensor, mean2: Tensor, var2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    grad_means: Tensor | None, weight: Tensor,
    x: Tensor, mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    eps1: float, act1: int,
    stride: int, pad_top: int, pad_left: int, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, channels, height, width = x.shape
    k, axis = weight.shape[2], pixel_axis(x)
    # Where the steps begin that cover the input, by rows and by columns, and how many there are.
    first_row, first_col = pad_top // stride, pad_left // stride
    steps, cols = (
        (pad + size - 1) // stride - pad // stride + 1 for pad, size in ((pad_top, height), (pad_left, width))
    )
    columns = 2 if k == 7 else 4
    lanes = triton.cdiv(cols, columns // stride)
    threads = 256 if k == 3 else 128  # each with one value of a tile, such that none spills
    if axis == 0:
        block_c = block(channels, 64, 16)
        block_w = min(threads // block_c, triton.next_power_of_2(lanes))
    else:
        block_w = block(lanes, 32, 1)
        block_c = min(threads // block_w, triton.next_power_of_2(channels))
    blocks_w, blocks_c = triton.cdiv(lanes, block_w), triton.cdiv(channels, block_c)
    warps = max(block_w * block_c // 32, 1)
    wanted = triton.cdiv(WARPS, blocks_w * blocks_c * warps)
    images = triton.cdiv(batch, wanted)
    # A band is twice as high, or more, as what of dy is computed again above it.
    band_steps = max(triton.cdiv(steps, max(wanted // max(batch, 1), 1)), min(2 * ((k - 1) // stride), steps))
    bands = triton.cdiv(steps, band_steps)
    parts = triton.cdiv(batch, max(images, 1)) * bands * blocks_w

    out = empty_map(x, x.shape) if need_input else None
    weights = x.new_empty((parts, *weight.shape), dtype=torch.float32) if need_weight else None
    sums = x.new_empty((2, parts, channels), dtype=torch.float32) if need_input and mean1 is not None else None

    def launch(out: Tensor | None, sums: Tensor | None, weights: Tensor | None) -> None:
        dwconv_backward_kernel[(parts * blocks_c,)](
            grad, *dense(scale, shift), y, *dense(mean2, var2, gamma2, beta2), eps2, *dense(grad_means, weight),
            x, *dense(mean1, var1, gamma1, beta1), eps1, out, sums, weights,
            batch, channels, height, width, y.shape[2], y.shape[3], pad_top, pad_left,
            images, bands, band_steps, blocks_w, first_row, first_col, parts,
            *grad.stride(), *y.stride(), *x.stride(), *strides(out),
            K=k, STRIDE=stride, ACT1=act1, ACT2=act2,
            COLUMNS=columns, BLOCK_W=block_w, BLOCK_C=block_c, PIXEL_AXIS=axis, num_warps=warps, maxnreg=REGISTERS,
        )  # fmt: skip

    if batch and k == 7 and out is not None and weights is not None:
        # 49 weights and the sums of 49 gradients do not fit a thread's registers: dy is computed twice.
        launch(out, sums, None)
        launch(None, None, weights)
    elif batch:
        launch(out, sums, weights)
    return (
        x.new_empty(0) if out is None else out,
        x.new_empty(0, dtype=torch.float32) if weights is None else weights.sum(0),
        x.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(1),
    )
