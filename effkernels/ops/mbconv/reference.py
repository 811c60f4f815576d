"""The MBConv block in plain PyTorch: the `eager` backend, and what the kernels are held against."""

from typing import Any

from torch import Tensor

from effkernels.ops._activation import ACTIVATIONS
from effkernels.ops.bn_project.reference import end, pointwise
from effkernels.ops.dwconv import reference as dwconv


def mbconv(
    x: Tensor, expand: Any, depthwise: Any, squeeze_excite: Any, project: Any, window: tuple[int, int, int, int, int],
    scale: Tensor | None, residual: bool,
) -> Tensor:  # fmt: skip
    """Arguments as for `effkernels.ops.mbconv`."""
    y = x if expand is None else pointwise(x, expand)
    y, _ = dwconv.dwconv_bn_act(
        y, depthwise.weight, depthwise.bn_weight, depthwise.bn_bias, depthwise.running_mean, depthwise.running_var,
        depthwise.training, depthwise.momentum, depthwise.eps, *window,
        act=ACTIVATIONS[depthwise.activation], pool=False,
    )  # fmt: skip
    return end(y, squeeze_excite, project, scale, x if residual else None)
