"""The squeeze-excite phases in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._triton import REGISTERS, SIGMOID, activate, activate_with_slope, stream
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.pointwise.triton import precision


def spatial_mean(x: Tensor) -> Tensor:
    return stream(x, None, reduce=Reduce.MEAN)


def channel_scale(x: Tensor, gate: Tensor) -> Tensor:
    y = empty_map(x, x.shape)
    stream(x, y, gate=gate)
    return y


@triton.jit
def linear_act_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, inputs, outputs, x_stride_n, x_stride_i, w_stride_o, w_stride_i, y_stride_n,
    ACT: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(outputs, BLOCK_O)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    offs_o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < outputs
    # Lanes run along the inputs, w's contiguous axis, and are summed once at the end.
    products = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for start in range(0, inputs, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I)
        mask_i = offs_i < inputs
        x = tl.load(x_ptr + n * x_stride_n + offs_i * x_stride_i, mask_i, 0.0)
        w_ptrs = w_ptr + offs_o[:, None] * w_stride_o + offs_i[None, :] * w_stride_i
        w = tl.load(w_ptrs, mask_o[:, None] & mask_i[None, :], 0.0)
        products += w.to(tl.float32) * x[None, :]
    y = tl.sum(products, 1)
    if b_ptr is not None:
        y += tl.load(b_ptr + offs_o, mask_o, 0.0).to(tl.float32)
    tl.store(y_ptr + n * y_stride_n + offs_o, activate(y, ACT), mask_o)


def linear_act(x: Tensor, w: Tensor, b: Tensor | None, act: int) -> Tensor:
    """act(w x + b) of each row, [N, I] -> [N, O], in float32."""
    (batch, inputs), outputs = x.shape, w.shape[0]
    y = x.new_empty((batch, outputs))
    block_i = min(256, triton.next_power_of_2(inputs))
    block_o = min(2048 // block_i, triton.next_power_of_2(outputs))
    if batch:
        linear_act_kernel[(batch * triton.cdiv(outputs, block_o),)](
            x, w, None if b is None else b.contiguous(), y, inputs, outputs, *x.stride(), *w.stride(), y.stride(0),
            ACT=act, BLOCK_I=block_i, BLOCK_O=block_o, num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
    return y


def se_gate(
    pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: int, gate: int
) -> Tensor:
    return linear_act(linear_act(pooled, w1, b1, act), w2, b2, gate)


@triton.jit
def load_before_gate(grad_ptr, gates_ptr, offs, mask, GATE: tl.constexpr):
    """The gradient before the gate's activation."""
    g = tl.load(gates_ptr + offs, mask, 0.0)
    slope = g * (1 - g) if GATE == SIGMOID else tl.where((g > 0) & (g < 1), 1 / 6, 0.0)
    return tl.load(grad_ptr + offs, mask, 0.0) * slope


@triton.jit(do_not_specialize=["channels", "hidden"])
def hidden_backward_kernel(
    grad_ptr, gates_ptr, pooled_ptr, w1_ptr, b1_ptr, w2_ptr, units_ptr, du1_ptr, channels, hidden,
    ACT: tl.constexpr, GATE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of an image the hidden units, and du1, the gradient before their activation."""
    blocks = tl.cdiv(hidden, BLOCK_R)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    offs_r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < hidden
    # Lanes run along the channels, and are summed once at the end.
    u1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    grad = u1
    for start in range(0, channels, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = offs_c < channels
        mask = mask_r[:, None] & mask_c[None, :]
        pooled = tl.load(pooled_ptr + n * channels + offs_c, mask_c, 0.0)
        du2 = load_before_gate(grad_ptr, gates_ptr, n * channels + offs_c, mask_c, GATE)
        w1 = tl.load(w1_ptr + offs_r[:, None] * channels + offs_c[None, :], mask, 0.0)
        w2 = tl.load(w2_ptr + offs_c[None, :] * hidden + offs_r[:, None], mask, 0.0)
        u1 += w1.to(tl.float32) * pooled[None, :]
        grad += w2.to(tl.float32) * du2[None, :]
    z = tl.sum(u1, 1)
    if b1_ptr is not None:
        z += tl.load(b1_ptr + offs_r, mask_r, 0.0).to(tl.float32)
    units, slope = activate_with_slope(z, ACT)
    tl.store(units_ptr + n * hidden + offs_r, units, mask_r)
    tl.store(du1_ptr + n * hidden + offs_r, tl.sum(grad, 1) * slope, mask_r)


@triton.jit(do_not_specialize=["batch", "channels", "hidden", "area"])
def gate_weights_backward_kernel(
    grad_ptr, gates_ptr, pooled_ptr, w1_ptr, units_ptr, du1_ptr,
    shift_ptr, sums_ptr, of_w1_ptr, of_b1_ptr, of_w2_ptr, of_b2_ptr, batch, channels, hidden, area,
    GATE: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of a block of channels everything else."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask_c = offs_c < channels
    images = tl.cast(batch, tl.int64) * channels
    of_b2 = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    of_slope = of_b2
    of_xhat = of_b2
    for first in range(0, batch, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        mask_n = offs_n < batch
        mask = mask_n & mask_c
        offs = offs_n * channels + offs_c
        of_mean = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, hidden, BLOCK_R):
            offs_r = start + tl.arange(0, BLOCK_R)
            du1 = tl.load(du1_ptr + offs_n * hidden + offs_r[None, :], mask_n & (offs_r < hidden)[None, :], 0.0)
            w1 = tl.load(w1_ptr + offs_r[:, None] * channels + offs_c, (offs_r < hidden)[:, None] & mask_c, 0.0)
            of_mean = tl.dot(du1, w1.to(tl.float32), of_mean, input_precision=PRECISION)
        shift = of_mean / area
        tl.store(shift_ptr + offs, shift, mask)
        of_b2 += load_before_gate(grad_ptr, gates_ptr, offs, mask, GATE)
        if SUMS:
            g = tl.load(gates_ptr + offs, mask, 0.0)
            grad_slope = tl.load(grad_ptr + images + offs, mask, 0.0)
            grad_xhat = tl.load(grad_ptr + 2 * images + offs, mask, 0.0)
            of_slope += g * grad_slope + shift * tl.load(pooled_ptr + images + offs, mask, 0.0)
            of_xhat += g * grad_xhat + shift * tl.load(pooled_ptr + 2 * images + offs, mask, 0.0)
    tl.store(of_b2_ptr + offs_c, tl.sum(of_b2, 0, keep_dims=True), mask_c)
    if SUMS:
        tl.store(sums_ptr + offs_c, tl.sum(of_slope, 0, keep_dims=True), mask_c)
        tl.store(sums_ptr + channels + offs_c, tl.sum(of_xhat, 0, keep_dims=True), mask_c)

    for start in range(0, hidden, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)[:, None]
        mask_r = offs_r < hidden
        of_w1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        of_w2 = of_w1
        of_b1 = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for first in range(0, batch, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
            mask_n = offs_n < batch
            mask = mask_n[:, None] & mask_c
            offs = offs_n[:, None] * channels + offs_c
            turned = offs_n[None, :] * hidden + offs_r
            du1 = tl.load(du1_ptr + turned, mask_r & mask_n[None, :], 0.0)
            units = tl.load(units_ptr + turned, mask_r & mask_n[None, :], 0.0)
            of_b1 += du1
            of_w1 = tl.dot(du1, tl.load(pooled_ptr + offs, mask, 0.0), of_w1, input_precision=PRECISION)
            du2 = load_before_gate(grad_ptr, gates_ptr, offs, mask, GATE)
            of_w2 = tl.dot(units, du2, of_w2, input_precision=PRECISION)
        tl.store(of_w1_ptr + offs_r * channels + offs_c, of_w1, mask_r & mask_c)
        tl.store(of_w2_ptr + offs_c * hidden + offs_r, of_w2, mask_r & mask_c)
        if tl.program_id(0) == 0:
            tl.store(of_b1_ptr + offs_r, tl.sum(of_b1, 1, keep_dims=True), mask_r)


def se_gate_backward(
    grad: Tensor, gates: Tensor, pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
    act: int, gate: int, area: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    (batch, channels), hidden = gates.shape, w1.shape[0]
    grad, gates, pooled, w1, w2 = (t.contiguous() for t in (grad, gates, pooled, w1, w2))
    shift, sums = torch.empty_like(gates), gates.new_empty((grad.shape[0] - 1, channels))
    of_w1, of_b1 = torch.empty_like(w1), w1.new_empty(hidden)
    of_w2, of_b2 = torch.empty_like(w2), w1.new_empty(channels)
    units, du1 = gates.new_empty((2, batch, hidden)).unbind()
    if batch:
        hidden_backward_kernel[(batch * triton.cdiv(hidden, 8),)](
            grad, gates, pooled, w1, None if b1 is None else b1.contiguous(), w2, units, du1, channels, hidden,
            ACT=act, GATE=gate, BLOCK_C=128, BLOCK_R=8, num_warps=4, maxnreg=REGISTERS,
        )  # fmt: skip
    gate_weights_backward_kernel[(triton.cdiv(channels, 16),)](
        grad, gates, pooled, w1, units, du1, shift, sums, of_w1, of_b1, of_w2, of_b2, batch, channels, hidden, area,
        GATE=gate, SUMS=len(sums) > 0, PRECISION=precision(),
        BLOCK_N=16, BLOCK_C=16, BLOCK_R=16, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return shift, sums, of_w1, of_b1, of_w2, of_b2
