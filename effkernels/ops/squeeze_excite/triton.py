"""The squeeze-excite phases in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._triton import REGISTERS, activate, stream
from effkernels.ops.batch_norm.op import Reduce


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
