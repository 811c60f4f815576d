"""The end of a block in plain PyTorch: the `eager` backend, and what the kernels are held against."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import ACTIVATIONS, GATES, activate
from effkernels.ops.squeeze_excite.reference import scale as gated
from effkernels.ops.squeeze_excite.reference import se_gate


def bn_project(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float, act: int, squeeze_excite: Any, project: Any, scale: Tensor | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    y = activate(F.batch_norm(x, running_mean, running_var, gamma, beta, training, momentum, eps), act)
    return end(y, squeeze_excite, project, scale, residual)


def end(y: Tensor, squeeze_excite: Any, project: Any, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """What comes after the activation, in a block with a depthwise convolution too."""
    if squeeze_excite is not None:
        w1, b1, w2, b2, activation, gate = squeeze_excite
        codes = ACTIVATIONS[activation], GATES[gate]
        y = gated(y, se_gate(y, None, w1.flatten(1), b1, w2.flatten(1), b2, *codes))
    y = pointwise(y, project)
    if scale is not None:
        y = y * scale.to(y.dtype)[:, None, None, None]
    return y if residual is None else y + residual


def pointwise(x: Tensor, stage: Any) -> Tensor:
    z = F.conv2d(x, stage.weight, stage.bias)
    norm = stage.running_mean, stage.running_var, stage.bn_weight, stage.bn_bias
    return activate(F.batch_norm(z, *norm, stage.training, stage.momentum, stage.eps), ACTIVATIONS[stage.activation])
