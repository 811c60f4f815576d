"""The expansion and the depthwise convolution in one kernel: `expand_dwconv`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkernels.ops._geometry import covered
from effkernels.ops._op import Flops, Op
from effkernels.ops.batch_norm.op import fake_sums


def _expand_dwconv_fake(x: Tensor, expand: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, out_h, out_w, reduce = rest
    d = x.new_empty((x.shape[0], expand.shape[0], out_h, out_w)).to(memory_format=torch.channels_last)
    return d, fake_sums(d, reduce)


def _expand_dwconv_parts_read(x: Tensor, *rest: Any) -> dict[str, Sequence[int]]:
    depthwise = rest[7]
    stride, top, left, out_h, out_w, _ = rest[-6:]
    (n, c, h, w), k = x.shape, depthwise.shape[2]
    return {"x": (n, c, covered(h, out_h, top, k, stride), covered(w, out_w, left, k, stride))}


def _expand_dwconv_flops(x: Tensor, expand: Tensor, *rest: Any) -> Flops:
    depthwise = rest[6]
    *_, out_h, out_w, _ = rest
    return Flops(2 * x[:, 0].numel() * expand.numel(), 2 * x.shape[0] * depthwise.numel() * out_h * out_w)


# d = act2(bn2(dwconv(act1(bn1(expand x))))), with zeros around the expanded map; expand is [hidden, C], depthwise
# [hidden, 1, k, k] with k 3 or 5, and d in channels_last, whatever x is. `reduce` adds what it adds to `dwconv`. The
# expanded map is rounded to the dtype of x, and never stored. C is limited by shared memory.
EXPAND_DWCONV = Op(
    "expand_dwconv",
    "(Tensor x,"
    " Tensor expand, Tensor? mean1, Tensor? var1, Tensor? gamma1, Tensor? beta1, float eps1, int act1,"
    " Tensor depthwise, Tensor? mean2, Tensor? var2, Tensor? gamma2, Tensor? beta2, float eps2, int act2,"
    " int stride, SymInt pad_top, SymInt pad_left, SymInt out_h, SymInt out_w, int reduce) -> (Tensor d, Tensor sums)",
    backends=("cuda",),
    fake=_expand_dwconv_fake,
    parts_read=_expand_dwconv_parts_read,
    flops=_expand_dwconv_flops,
)
