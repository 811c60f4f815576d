"""What the Triton kernels share: tiles, activations, BatchNorm's affine map, reductions, and a pass over a map.

A tile is [pixels, channels] where channels are contiguous in memory and [channels, pixels] elsewhere, so that
neighbouring lanes load neighbouring values. `PIXEL_AXIS` says which; everything else is written once, by broadcasting.

Triton compiles a kernel anew for integers that are 1 or multiples of 16: not for those that only count.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.ops._activation import Activation
from effkernels.ops.batch_norm.op import Reduce

SILU = tl.constexpr(Activation.SILU.value)
RELU = tl.constexpr(Activation.RELU.value)
RELU6 = tl.constexpr(Activation.RELU6.value)
HARDSWISH = tl.constexpr(Activation.HARDSWISH.value)
SIGMOID = tl.constexpr(Activation.SIGMOID.value)
HARDSIGMOID = tl.constexpr(Activation.HARDSIGMOID.value)
MEAN = tl.constexpr(Reduce.MEAN.value)
STATISTICS = tl.constexpr(Reduce.STATISTICS.value)

# Registers of a thread where every one may be needed: left to itself, ptxas spills a few to make room for more threads.
REGISTERS = 255
WARPS = 8192  # the most that a current GPU runs at a time: a reduction's programs take more pixels beyond that


def pixel_axis(x: Tensor) -> int:
    return 0 if x.stride(1) == 1 and x.shape[1] > 1 else 1


def block(extent: int, limit: int, least: int) -> int:
    """The largest power of two in [least, limit] whose multiples cover `extent` with under a quarter of lanes idle."""
    size = min(limit, triton.next_power_of_2(extent))
    while size > least and 4 * extent <= 3 * size * triton.cdiv(extent, size):
        size //= 2
    return size


def dense(*vectors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors are small: a strided one is copied."""
    return [None if v is None else v.contiguous() for v in vectors]


@triton.jit
def channel_block(channels, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr):
    """This program's channels, of which a thread takes up to VECTOR in a row, and its number among their programs."""
    # Channels come first: programs that run together read the same rows, which share sectors in channels_last.
    blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    offs_c = tl.max_contiguous((pid % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C), VECTOR)
    return tl.expand_dims(offs_c, PIXEL_AXIS), pid // blocks


@triton.jit
def activate(z, code: tl.constexpr):
    # Comparisons, not minima and maxima: NaN passes through, as in PyTorch.
    if code == SILU:
        z = z / (1 + tl.exp(-z))
    elif code == SIGMOID:
        z = 1 / (1 + tl.exp(-z))
    elif code == RELU:
        z = tl.where(z < 0, 0.0, z)
    elif code == RELU6:
        z = clamp6(z)
    elif code == HARDSWISH:
        z = z * clamp6(z + 3) * (1 / 6)
    elif code == HARDSIGMOID:
        z = clamp6(z + 3) * (1 / 6)
    return z


@triton.jit
def clamp6(z):
    return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))


@triton.jit
def activate_with_slope(z, code: tl.constexpr):
    """act(z) and act'(z)."""
    if code == SILU:
        sigmoid = 1 / (1 + tl.exp(-z))
        y = z * sigmoid
        slope = sigmoid * (1 + z * (1 - sigmoid))
    else:
        y = activate(z, code)
        slope = tl.full(z.shape, 1.0, tl.float32)
        if code == RELU:
            slope = tl.where(z <= 0, 0.0, slope)
        elif code == RELU6:
            slope = tl.where((z <= 0) | (z >= 6), 0.0, slope)
        elif code == HARDSWISH:
            slope = tl.where(z <= -3, 0.0, tl.where(z < 3, z * (1 / 3) + 0.5, slope))
        elif code == SIGMOID:
            slope = y * (1 - y)
        elif code == HARDSIGMOID:
            slope = tl.where((z > -3) & (z < 3), 1 / 6, 0.0)
    return y, slope


@triton.jit
def load_inverse_deviation(var_ptr, eps, offs_c, mask):
    return 1 / tl.sqrt(tl.load(var_ptr + offs_c, mask, 1.0).to(tl.float32) + eps)


@triton.jit
def load_norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_c, mask):
    """BatchNorm's mean, scale and shift of each channel; nothing where there is no mean."""
    if mean_ptr is None:
        norm = ()
    else:
        mean = tl.load(mean_ptr + offs_c, mask, 0.0).to(tl.float32)
        scale = load_inverse_deviation(var_ptr, eps, offs_c, mask)
        shift = tl.zeros_like(mean)
        if gamma_ptr is not None:
            scale *= tl.load(gamma_ptr + offs_c, mask, 0.0).to(tl.float32)
        if beta_ptr is not None:
            shift = tl.load(beta_ptr + offs_c, mask, 0.0).to(tl.float32)
        norm = (mean, scale, shift)
    return norm


@triton.jit
def centre(x, norm):
    # The mean goes first: folded into the shift, it would cancel where it is large beside the deviation.
    if len(norm) > 0:
        x = x - norm[0]
    return x


@triton.jit
def affine(centred, norm):
    if len(norm) > 0:
        centred = centred * norm[1] + norm[2]
    return centred


@triton.jit
def norm_act(x, norm, code: tl.constexpr):
    return activate(affine(centre(x, norm), norm), code)


@triton.jit
def load_drift(means_ptr, var_ptr, eps, channels, offs_c, mask):
    """What batch statistics take from a gradient: its mean, and its mean product with xhat over the deviation.

    `means_ptr` is [2, C]; nothing where there is none and the statistics are fixed.
    """
    if means_ptr is None:
        drift = ()
    else:
        along = tl.load(means_ptr + channels + offs_c, mask, 0.0) * load_inverse_deviation(var_ptr, eps, offs_c, mask)
        drift = (tl.load(means_ptr + offs_c, mask, 0.0), along)
    return drift


@triton.jit
def norm_backward(grad, centred, norm, drift):
    """The gradient of x from that of bn(x)."""
    if len(drift) > 0:
        grad = grad - drift[0] - centred * drift[1]
    return grad * norm[1]


@triton.jit
def load_per_image(ptr, n, channels, offs_c, mask):
    """The values of image `n` in [N, C]; nothing where there are none."""
    if ptr is None:
        values = ()
    else:
        values = (tl.load(ptr + n * channels + offs_c, mask, 0.0),)
    return values


@triton.jit
def scale_shift(x, scale, shift):
    if len(scale) > 0:
        x = x * scale[0]
    if len(shift) > 0:
        x = x + shift[0]
    return x


@triton.jit
def reduce_start(zeros, pixels, REDUCE: tl.constexpr):
    """The running reduction of each lane of a tile: nothing, a sum, or count, pivot, sum and sum of squares."""
    if REDUCE == STATISTICS:
        state = (tl.zeros_like(pixels).to(tl.float32), zeros, zeros, zeros)
    elif REDUCE == MEAN:
        state = (zeros,)
    else:
        state = ()
    return state


@triton.jit
def reduce_add(state, y, mask, REDUCE: tl.constexpr):
    """Take in the values `y` as they were stored, where the pixels' `mask` says so."""
    y = y.to(tl.float32)
    if REDUCE == STATISTICS:
        # The differences from a lane's first value are exact for values close together, however far from zero. That
        # value being one of n, subtracting the square of their sum loses at most a factor of n of precision.
        count, pivot, total, squares = state
        pivot = tl.where(mask & (count == 0), y, pivot)  # a lane without pixels keeps zero
        y = tl.where(mask, y - pivot, 0.0)
        state = (count + mask.to(tl.float32), pivot, total + y, squares + y * y)
    elif REDUCE == MEAN:
        state = (state[0] + tl.where(mask, y, 0.0),)
    return state


@triton.jit
def reduce_store(state, parts_ptr, part, channels, offs_c, mask, share, AXIS: tl.constexpr, REDUCE: tl.constexpr):
    """Reduce over the lanes along `AXIS`, and store this program's part, as `empty_parts` has it."""
    ptrs = parts_ptr + part.to(tl.int64) * channels * len(state) + offs_c
    if REDUCE == STATISTICS:
        count, pivot, total, squares = state
        # Divided exactly: a plain division is off by some units in the last place, which the difference below enlarges.
        mean = tl.div_rn(total, tl.maximum(count, 1.0))
        # Offsets from about the mean of all are small, and so is their error.
        common = sum_of_products(count, pivot + mean, AXIS) / tl.sum(count, AXIS, keep_dims=True)
        count, offset, m2 = chan_reduce(count, pivot - common + mean, squares - total * mean, AXIS)
        tl.store(ptrs, count, mask)
        tl.store(ptrs + channels, common, mask)
        tl.store(ptrs + 2 * channels, offset, mask)
        tl.store(ptrs + 3 * channels, m2, mask)
    elif REDUCE == MEAN:
        tl.store(ptrs, tl.sum(state[0], AXIS, keep_dims=True) * share, mask)


@triton.jit
def reduce_tile(y, mask_p, parts_ptr, part, channels, offs_c, mask, share, AXIS: tl.constexpr, REDUCE: tl.constexpr):
    """Reduce one tile, as it was stored, over the pixels of `mask_p` along `AXIS`, and store it as `reduce_store` does.

    Of a tile at hand, the second pass corrects the mean of the first.
    """
    y = tl.where(mask_p, y.to(tl.float32), 0.0)
    if REDUCE == STATISTICS:
        ptrs = parts_ptr + part.to(tl.int64) * channels * 4 + offs_c
        count = tl.sum(mask_p.to(tl.float32), AXIS, keep_dims=True)
        common = tl.sum(y, AXIS, keep_dims=True) / count
        centred = tl.where(mask_p, y - common, 0.0)
        offset = tl.sum(centred, AXIS, keep_dims=True) / count
        centred = tl.where(mask_p, centred - offset, 0.0)
        tl.store(ptrs, tl.broadcast_to(count, common.shape), mask)
        tl.store(ptrs + channels, common, mask)
        tl.store(ptrs + 2 * channels, offset, mask)
        tl.store(ptrs + 3 * channels, sum_of_products(centred, centred, AXIS), mask)
    elif REDUCE == MEAN:
        tl.store(parts_ptr + part.to(tl.int64) * channels + offs_c, tl.sum(y, AXIS, keep_dims=True) * share, mask)


@triton.jit
def sum_of_products(a, b, AXIS: tl.constexpr):
    # fma, as each lane would fuse a bare product with the sum's first addition, and copies of the sum would differ.
    return tl.sum(tl.fma(a, b, tl.zeros_like(a)), AXIS, keep_dims=True)


@triton.jit
def chan_reduce(count, mean, m2, AXIS: tl.constexpr):
    """Counts, means and squared deviations of sets of values along `AXIS`, together (Chan, Golub and LeVeque)."""
    total = tl.sum(count, AXIS, keep_dims=True)
    merged = tl.div_rn(sum_of_products(count, mean, AXIS), total)
    delta = mean - merged
    return total, merged, tl.sum(m2 + count * delta * delta, AXIS, keep_dims=True)


@triton.jit(do_not_specialize=["parts"])
def merge_statistics_kernel(parts_ptr, stats_ptr, parts, channels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c, _ = channel_block(channels, 1, BLOCK_C, 0)
    mask_c = offs_c < channels
    common = tl.load(parts_ptr + channels + offs_c, mask_c & (parts > 0), 0.0)
    count = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    mean = count
    m2 = count
    for start in range(0, parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (offs_p < parts) & mask_c
        ptrs = parts_ptr + offs_p.to(tl.int64) * channels * 4 + offs_c
        part = tl.load(ptrs, mask, 0.0)
        pivot = tl.load(ptrs + channels, mask, 0.0)
        delta = pivot - common + tl.load(ptrs + 2 * channels, mask, 0.0) - mean
        m2 += tl.load(ptrs + 3 * channels, mask, 0.0)
        count += part
        weight = part / tl.maximum(count, 1.0)
        m2 += delta * delta * (count - part) * weight
        mean += delta * weight
    count, mean, m2 = chan_reduce(count, mean, m2, 0)
    tl.store(stats_ptr + offs_c, common + mean, mask_c)
    tl.store(stats_ptr + channels + offs_c, m2 / count, mask_c)


@triton.jit
def sums_start(like, COUNT: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros_like(like),)
    return sums


@triton.jit
def sums_add(sums, values, mask):
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + tl.where(mask, values[i], 0.0),)
    return added


@triton.jit
def sums_store(sums, parts_ptr, part, parts, channels, offs_c, mask, AXIS: tl.constexpr):
    """Add up the lanes along `AXIS`, and store this program's part in [sums, parts, C]."""
    for i in tl.static_range(len(sums)):
        ptrs = parts_ptr + (tl.cast(parts, tl.int64) * i + part) * channels + offs_c
        tl.store(ptrs, tl.sum(sums[i], AXIS, keep_dims=True), mask)


def empty_parts(x: Tensor, parts: int, reduce: int) -> Tensor:
    """Room for the parts: none, mean [parts, 1, C], or count, pivot, mean - pivot, squared deviations [parts, 4, C]."""
    if reduce == Reduce.NONE:
        return x.new_empty(0, dtype=torch.float32)
    return x.new_empty((parts, 4 if reduce == Reduce.STATISTICS else 1, x.shape[1]), dtype=torch.float32)


def sums_per_image(parts: Tensor, batch: int) -> Tensor:
    """The sums of the images, [sums, N, C], of parts [sums, parts, C], those of an image in a row."""
    sums, count, channels = parts.shape
    if count == batch:
        return parts
    return parts.view(sums, batch, count // batch, channels).sum(2)


def finish(parts: Tensor, batch: int, reduce: int) -> Tensor:
    """The reduction of all programs' parts, in a fixed order: an empty tensor, mean [N, C], or statistics [2, C]."""
    if reduce == Reduce.NONE:
        return parts
    count, _, channels = parts.shape
    if reduce == Reduce.MEAN:
        return sums_per_image(parts.view(1, count, channels), batch).view(batch, channels)
    stats = parts.new_empty((2, channels))
    merge_statistics_kernel[(triton.cdiv(channels, 8),)](
        parts, stats, count, channels, BLOCK_P=256, BLOCK_C=8, num_warps=8, maxnreg=REGISTERS
    )
    return stats


@triton.jit
def span_start(part, height, spans, steps):
    """Image, row and first tile of a program, by `Spans`."""
    return (part // spans // height).to(tl.int64), (part // spans % height).to(tl.int64), part % spans * steps


@triton.jit(do_not_specialize=["spans", "steps"])
def stream_kernel(
    x_ptr, y_ptr, parts_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, gate_ptr, residual_ptr,
    channels, height, width, spans, steps, share,
    x_stride_n, x_stride_c, x_stride_h, x_stride_w, y_stride_n, y_stride_c, y_stride_h, y_stride_w,
    residual_stride_n, residual_stride_c, residual_stride_h, residual_stride_w,
    ACT: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PIXEL_AXIS: tl.constexpr,
):  # fmt: skip
    offs_c, part = channel_block(channels, 8, BLOCK_C, PIXEL_AXIS)
    mask_c = offs_c < channels
    n, row, first = span_start(part, height, spans, steps)
    norm = load_norm(mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps, offs_c, mask_c)
    gate = load_per_image(gate_ptr, n, channels, offs_c, mask_c)
    x_ptrs = x_ptr + n * x_stride_n + offs_c * x_stride_c + row * x_stride_h
    if y_ptr is not None:
        y_ptrs = y_ptr + n * y_stride_n + offs_c * y_stride_c + row * y_stride_h
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + n * residual_stride_n + offs_c * residual_stride_c + row * residual_stride_h
    pixels = tl.expand_dims(tl.arange(0, BLOCK_P), 1 - PIXEL_AXIS)
    zeros = tl.zeros((BLOCK_P, BLOCK_C) if PIXEL_AXIS == 0 else (BLOCK_C, BLOCK_P), tl.float32)
    state = reduce_start(zeros, pixels, REDUCE)
    for step in range(first, first + steps):
        offs_p = tl.cast(step, tl.int64) * BLOCK_P + pixels
        mask = (offs_p < width) & mask_c
        y = norm_act(tl.load(x_ptrs + offs_p * x_stride_w, mask, 0.0).to(tl.float32), norm, ACT)
        y = scale_shift(y, gate, ())
        if residual_ptr is not None:
            y += tl.load(residual_ptrs + offs_p * residual_stride_w, mask, 0.0).to(tl.float32)
        y = y.to(x_ptr.dtype.element_ty)
        if y_ptr is not None:
            tl.store(y_ptrs + offs_p * y_stride_w, y, mask)
        state = reduce_add(state, y, offs_p < width, REDUCE)
    reduce_store(state, parts_ptr, part, channels, offs_c, mask_c, share, PIXEL_AXIS, REDUCE)


class Spans(NamedTuple):
    """How programs share the passes over maps: each takes `steps` tiles of a row of `width` pixels."""

    height: int
    width: int
    spans: int  # of a row
    steps: int
    parts: int  # programs of a channel
    programs: int
    tile: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, *others: Tensor | None, reduces: bool) -> "Spans":
        batch, channels, height, width = x.shape
        if all(t is None or is_one_row(t) for t in (x, *others)):
            height, width = 1, height * width
        axis = pixel_axis(x)
        if axis == 0:
            block_c = block(channels, 64, 16)
            block_p = min(1024 // block_c, triton.next_power_of_2(width))
        else:
            block_p = block(width, 1024, 64)
            block_c = min(1024 // block_p, triton.next_power_of_2(channels))
        tiles, blocks_c = triton.cdiv(width, block_p), triton.cdiv(channels, block_c)
        steps = 1
        if reduces:
            steps = min(tiles, triton.cdiv(4 * batch * height * blocks_c * tiles, WARPS))
        spans = triton.cdiv(tiles, max(steps, 1))
        parts = batch * height * spans
        tile = dict(BLOCK_P=block_p, BLOCK_C=block_c, PIXEL_AXIS=axis, num_warps=4, maxnreg=REGISTERS)
        return cls(height, width, spans, steps, parts, parts * blocks_c, tile)


def is_one_row(x: Tensor) -> bool:
    """Without gaps between its rows, a map is one long row."""
    return x.stride(2) == x.shape[3] * x.stride(3)


def strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def stream(
    x: Tensor,
    y: Tensor | None,
    mean: Tensor | None = None, var: Tensor | None = None, gamma: Tensor | None = None, beta: Tensor | None = None,
    eps: float = 0.0, act: int = 0, gate: Tensor | None = None, residual: Tensor | None = None,
    reduce: int = Reduce.NONE,
) -> Tensor:  # fmt: skip
    """One pass over x, for y = gate * act(bn(x)) + residual, of which any may be missing; returns `reduce` of y as
    stored."""
    batch, channels, height, width = x.shape
    share = Spans.of(x, y, residual, reduces=reduce != Reduce.NONE)
    parts = empty_parts(x, share.parts, reduce)
    if batch:
        stream_kernel[(share.programs,)](
            x, y, parts, *dense(mean, var, gamma, beta), eps, *dense(gate), residual,
            channels, share.height, share.width, share.spans, share.steps, 1 / (height * width),
            *x.stride(), *strides(y), *strides(residual),
            ACT=act, REDUCE=reduce, **share.tile,
        )  # fmt: skip
    return finish(parts, batch, reduce)
