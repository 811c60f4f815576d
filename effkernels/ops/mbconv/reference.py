"""The MBConv block in plain PyTorch: the `eager` backend, and what the kernels are held against."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import ACTIVATIONS, GATES, activate
from effkernels.ops.dwconv import reference as dwconv
from effkernels.ops.squeeze_excite.reference import scale as gated
from effkernels.ops.squeeze_excite.reference import se_gate


def mbconv(
    x: Tensor, expand: Any, depthwise: Any, squeeze_excite: Any, project: Any, window: tuple[int, int, int, int, int],
    scale: Tensor | None, residual: bool,
) -> Tensor:  # fmt: skip
    """Arguments as for `effkernels.ops.mbconv`."""
    y = x if expand is None else _pointwise(x, expand)
    y, _ = dwconv.dwconv_bn_act(
        y, depthwise.weight, depthwise.bn_weight, depthwise.bn_bias, depthwise.running_mean, depthwise.running_var,
        depthwise.training, depthwise.momentum, depthwise.eps, *window,
        act=ACTIVATIONS[depthwise.activation], pool=False,
    )  # fmt: skip
    if squeeze_excite is not None:
        w1, b1, w2, b2, activation, gate = squeeze_excite
        codes = ACTIVATIONS[activation], GATES[gate]
        y = gated(y, se_gate(y, None, w1.flatten(1), b1, w2.flatten(1), b2, *codes))
    y = _pointwise(y, project)
    if scale is not None:
        y = y * scale.to(y.dtype)[:, None, None, None]
    return y + x if residual else y


def _pointwise(x: Tensor, stage: Any) -> Tensor:
    z = F.conv2d(x, stage.weight, stage.bias)
    norm = stage.running_mean, stage.running_var, stage.bn_weight, stage.bn_bias
    return activate(F.batch_norm(z, *norm, stage.training, stage.momentum, stage.eps), ACTIVATIONS[stage.activation])
