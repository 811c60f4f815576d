"""Activations and gates: their codes (the same in csrc/common/activation.h), values and derivatives."""

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(IntEnum):
    IDENTITY = 0
    SILU = 1
    RELU = 2
    RELU6 = 3
    HARDSWISH = 4
    SIGMOID = 5
    HARDSIGMOID = 6


ACTIVATIONS = {"identity": 0, "silu": 1, "relu": 2, "relu6": 3, "hardswish": 4}
GATES = {"sigmoid": 5, "hardsigmoid": 6}


def activate(z: Tensor, code: int) -> Tensor:
    if code == Activation.SILU:
        return F.silu(z)
    if code == Activation.RELU:
        return F.relu(z)
    if code == Activation.RELU6:
        return F.relu6(z)
    if code == Activation.HARDSWISH:
        return F.hardswish(z)
    if code == Activation.SIGMOID:
        return torch.sigmoid(z)
    if code == Activation.HARDSIGMOID:
        return F.hardsigmoid(z)
    return z


def activate_backward(grad: Tensor, z: Tensor, code: int) -> Tensor:
    """grad * activate'(z)."""
    if code == Activation.SILU:
        return aten.silu_backward(grad, z)
    if code == Activation.RELU:
        return aten.threshold_backward(grad, z, 0)
    if code == Activation.RELU6:
        return aten.hardtanh_backward(grad, z, 0, 6)
    if code == Activation.HARDSWISH:
        return aten.hardswish_backward(grad, z)
    if code == Activation.SIGMOID:
        return aten.sigmoid_backward(grad, torch.sigmoid(z))
    if code == Activation.HARDSIGMOID:
        return aten.hardsigmoid_backward(grad, z)
    return grad
