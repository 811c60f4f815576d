"""The depthwise convolution in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._triton import (
    block,
    channel_block,
    dense,
    empty_parts,
    finish,
    load_norm,
    norm_act,
    pixel_axis,
    reduce_add,
    reduce_start,
    reduce_store,
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
        size = 1024 if k == 3 and stride == 1 else 512
        block_w = block(out_w, size // 32, 8)
        block_c = block(x.shape[1], min(size // block_w, 64), 16)
        warps = 8 if k == 7 and stride == 2 else 4
    else:
        # Whole rows where they fit; one warp, so that its lanes run along a row and share channels.
        block_w = block(out_w, 128, 16)
        block_c = min(2 * max(32 // block_w, 1), triton.next_power_of_2(x.shape[1]))
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
            K=k, STRIDE=stride, ACT1=act1, ACT2=act2, REDUCE=reduce, **shape,
        )  # fmt: skip
    return y, finish(parts, batch, reduce)
