"""A whole MBConv block in inference: `mbconv_inference`, and on the CPU the same with weights packed once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkernels import _native
from effkernels.ops import _tiles
from effkernels.ops._layout import empty_map
from effkernels.ops._op import COMPOSITIONS, Flops, Op
from effkernels.ops._precision import allow_tf32
from effkernels.ops.batch_norm.op import Reduce, statistics_dtype
from effkernels.ops.dwconv.op import DWCONV, NO_NORM
from effkernels.ops.expand_dwconv.op import EXPAND_DWCONV
from effkernels.ops.pointwise_inference.op import POINTWISE_INFERENCE
from effkernels.ops.squeeze_excite.op import SE_GATE

# act1(bn1(.)) follows the 1x1 convolution `expand` [hidden, C, 1, 1], act2(bn2(.)) the depthwise one [hidden, 1, k, k],
# gate(w2 act(w1 mean + b1) + b2) scales its channels, bn3 follows the 1x1 convolution `project` [out, hidden, 1, 1].
_BLOCK = (
    "Tensor? expand, Tensor? mean1, Tensor? var1, Tensor? gamma1, Tensor? beta1, float eps1, int act1,"
    " Tensor depthwise, Tensor mean2, Tensor var2, Tensor? gamma2, Tensor? beta2, float eps2, int act2,"
    " Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, int squeeze_act, int gate,"
    " Tensor project, Tensor mean3, Tensor var3, Tensor? gamma3, Tensor? beta3, float eps3"
)
_WINDOW = "int stride, SymInt pad_top, SymInt pad_left, SymInt out_h, SymInt out_w, bool residual"
_DEPTHWISE, _PROJECT = 7, 20  # their places in _BLOCK


def _scratch(x: Tensor, hidden: int, out_h: int, out_w: int) -> dict[str, Tensor]:
    """The depthwise output, on the CPU in at least float32."""
    dtype = statistics_dtype(x) if x.device.type == "cpu" else x.dtype
    return {"d": torch.empty((x.shape[0], hidden, out_h, out_w), dtype=dtype, device="meta")}


def _times_read(*arguments: Any) -> dict[str, int]:
    """A shortcut reads x again."""
    return {"x": 1 + arguments[-1]}


def _flops(
    x: Tensor, hidden: int, out_channels: int, has_expand: bool, kernel_size: int, squeezed: int, out_h: int, out_w: int
) -> Flops:
    n, channels, h, w = x.shape
    expand, project = has_expand * channels * h * w, out_channels * out_h * out_w
    gate = 2 * squeezed
    return Flops(2 * n * hidden * (expand + gate + project), 2 * n * hidden * kernel_size**2 * out_h * out_w)


def _mbconv_inference_flops(x: Tensor, *arguments: Any) -> Flops:
    expand, depthwise, w1, project = (arguments[i] for i in (0, _DEPTHWISE, 14, _PROJECT))
    return _flops(
        x, depthwise.shape[0], project.shape[0], expand is not None, depthwise.shape[2],
        0 if w1 is None else w1.shape[0], *arguments[-3:-1],
    )  # fmt: skip


def _mbconv_inference_fake(x: Tensor, *arguments: Any) -> Tensor:
    *_, out_h, out_w, _ = arguments
    return empty_map(x, (x.shape[0], arguments[_PROJECT].shape[0], out_h, out_w))


MBCONV_INFERENCE = Op(
    "mbconv_inference",
    f"(Tensor x, {_BLOCK}, {_WINDOW}) -> Tensor",
    fake=_mbconv_inference_fake,
    backends=("cpp", "cuda"),
    scratch=lambda x, *arguments: _scratch(x, arguments[_DEPTHWISE].shape[0], *arguments[-3:-1]),
    times_read=_times_read,
    flops=_mbconv_inference_flops,
)


def _launches_on_cuda(x: Tensor, *arguments: Any) -> Tensor:
    """What csrc/mbconv_inference/cuda.cpp launches."""
    (expand, *norm1), (depthwise, *norm2) = arguments[:_DEPTHWISE], arguments[_DEPTHWISE:14]
    w1, b1, w2, b2, squeeze_act, gate_act, project, *norm3 = arguments[14:26]
    *window, residual = arguments[26:]
    reduce = Reduce.NONE if w1 is None else Reduce.MEAN
    if expand is not None and _expands_inside(x, depthwise, window):
        d, pooled = EXPAND_DWCONV("cuda", x, expand.flatten(1), *norm1, depthwise, *norm2, *window, reduce)
    else:
        e = x if expand is None else POINTWISE_INFERENCE("cuda", x, expand.flatten(1), *norm1, None, None)
        d, pooled = DWCONV("cuda", e, depthwise, *NO_NORM, *norm2, *window, reduce)
    gate = None
    if w1 is not None:
        gate = SE_GATE("cuda", pooled, w1.flatten(1), b1, w2.flatten(1), b2, squeeze_act, gate_act)
    y: Tensor = POINTWISE_INFERENCE("cuda", d, project.flatten(1), *norm3, 0, gate, x if residual else None)
    return y


def _expands_inside(x: Tensor, depthwise: Tensor, window: Sequence[int]) -> bool:
    """Whether the expansion has no launch of its own, by the rule of the launcher, if it was built."""
    stride, top, left, out_h, out_w = window
    if _native.introspection is None or EXPAND_DWCONV.name in _tiles.asked_for:
        return True
    d = torch.empty((x.shape[0], depthwise.shape[0], out_h, out_w), device="meta").to(memory_format=torch.channels_last)
    maps = [(0, tuple(t.shape), t.stride()) for t in (x, d)]
    norm = ((0,) * 4, 0.0, 0, 0)
    plan = _native.introspection.expand_dwconv_plan(
        *maps, str(x.dtype).removeprefix("torch."), 0, norm, 0, norm, depthwise.shape[2], stride, top, left, 0,
        x.dtype == torch.float32 and allow_tf32(),
    )  # fmt: skip
    return plan is not None and plan["worthwhile"]


# In C++ it is one op, whose launches can be called, and counted, one by one.
COMPOSITIONS[MBCONV_INFERENCE.overloads["cuda"]] = _launches_on_cuda


def _mbconv_pack_fake(*arguments: Any) -> Tensor:
    # How weights are laid out depends on the CPU.
    depthwise: Tensor = arguments[_DEPTHWISE]
    return depthwise.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=statistics_dtype(depthwise))


MBCONV_PACK = Op("mbconv_pack", f"({_BLOCK}) -> Tensor", fake=_mbconv_pack_fake, backends=("cpp",))


def _mbconv_packed_fake(x: Tensor, packed: Tensor, hidden: int, out_channels: int, *arguments: Any) -> Tensor:
    *_, out_h, out_w, _ = arguments
    return empty_map(x, (x.shape[0], out_channels, out_h, out_w))


def _mbconv_packed_flops(x: Tensor, packed: Tensor, hidden: int, out_channels: int, *rest: Any) -> Flops:
    has_expand, kernel_size, _, _, squeezed = rest[:5]
    return _flops(x, hidden, out_channels, has_expand, kernel_size, squeezed, *rest[-3:-1])


MBCONV_PACKED = Op(
    "mbconv_packed",
    "(Tensor x, Tensor packed, int hidden, int out_channels, bool has_expand, int kernel_size, int act1, int act2,"
    f" int squeezed, int squeeze_act, int gate, {_WINDOW}) -> Tensor",
    fake=_mbconv_packed_fake,
    backends=("cpp",),
    scratch=lambda x, packed, hidden, *arguments: _scratch(x, hidden, *arguments[-3:-1]),
    times_read=_times_read,
    flops=_mbconv_packed_flops,
)
