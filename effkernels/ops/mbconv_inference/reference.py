"""`mbconv_inference` in plain PyTorch: the `eager` backend, and what the kernels are held against."""

import torch.nn.functional as F
from torch import Tensor

from effkernels.ops._activation import ACTIVATIONS, GATES, activate
from effkernels.ops.dwconv import Norm
from effkernels.ops.dwconv import reference as dwconv
from effkernels.ops.squeeze_excite import reference as squeeze_excite


def mbconv_inference(
    x: Tensor, expand: tuple[Tensor, Norm] | None, depthwise: tuple[Tensor, Norm],
    gate: tuple[Tensor, Tensor | None, Tensor, Tensor | None, str, str] | None, project: tuple[Tensor, Norm],
    window: tuple[int, int, int, int, int], residual: bool,
) -> Tensor:  # fmt: skip
    e = x
    if expand is not None:
        weight, norm = expand
        e = activate(_norm(F.conv2d(x, weight), norm), ACTIVATIONS[norm.activation])
    weight, norm = depthwise
    d, pooled = dwconv.dwconv_bn_act(
        e, weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.0, norm.eps,
        *window, ACTIVATIONS[norm.activation], gate is not None,
    )  # fmt: skip
    if gate is not None:
        w1, b1, w2, b2, activation, gate_activation = gate
        codes = ACTIVATIONS[activation], GATES[gate_activation]
        gates = squeeze_excite.se_gate(d, pooled, w1.flatten(1), b1, w2.flatten(1), b2, *codes)
        d = squeeze_excite.scale(d, gates)
    weight, norm = project
    y = _norm(F.conv2d(d, weight), norm)
    return y + x if residual else y


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
