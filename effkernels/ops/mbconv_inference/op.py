"""A whole MBConv block in inference: `mbconv_inference`, and on the CPU the same with weights packed once."""

from typing import Any

import torch
from torch import Tensor

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Op
from effkernels.ops.batch_norm.op import statistics_dtype

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


def _unseen_bytes(x: Tensor, hidden: int, out_h: int, out_w: int, residual: bool) -> int:
    """The depthwise output is written and read once, on the CPU in at least float32; a shortcut reads x again."""
    size = x.element_size() if x.is_cuda else statistics_dtype(x).itemsize
    return 2 * x.shape[0] * hidden * out_h * out_w * size + residual * x.numel() * x.element_size()


def _mbconv_inference_fake(x: Tensor, *arguments: Any) -> Tensor:
    *_, out_h, out_w, _ = arguments
    return empty_map(x, (x.shape[0], arguments[_PROJECT].shape[0], out_h, out_w))


MBCONV_INFERENCE = Op(
    "mbconv_inference",
    f"(Tensor x, {_BLOCK}, {_WINDOW}) -> Tensor",
    fake=_mbconv_inference_fake,
    backends=("cpp", "cuda"),
    unseen_bytes=lambda x, *arguments: _unseen_bytes(x, arguments[_DEPTHWISE].shape[0], *arguments[-3:]),
)


def _mbconv_pack_fake(*arguments: Any) -> Tensor:
    # How weights are laid out depends on the CPU.
    depthwise: Tensor = arguments[_DEPTHWISE]
    return depthwise.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=statistics_dtype(depthwise))


MBCONV_PACK = Op("mbconv_pack", f"({_BLOCK}) -> Tensor", fake=_mbconv_pack_fake, backends=("cpp",))


def _mbconv_packed_fake(x: Tensor, packed: Tensor, hidden: int, out_channels: int, *arguments: Any) -> Tensor:
    *_, out_h, out_w, _ = arguments
    return empty_map(x, (x.shape[0], out_channels, out_h, out_w))


MBCONV_PACKED = Op(
    "mbconv_packed",
    "(Tensor x, Tensor packed, int hidden, int out_channels, bool has_expand, int kernel_size, int act1, int act2,"
    f" int squeezed, int squeeze_act, int gate, {_WINDOW}) -> Tensor",
    fake=_mbconv_packed_fake,
    backends=("cpp",),
    unseen_bytes=lambda x, packed, hidden, *arguments: _unseen_bytes(x, hidden, *arguments[-3:]),
)
