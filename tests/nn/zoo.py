"""Other libraries' models and blocks; a test that asks for a library that is not installed is skipped."""

import pytest
import torch
from torch import nn


def torchvision():
    return pytest.importorskip("torchvision", reason="torchvision is not installed")


def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


MODELS = {
    "torchvision b0": lambda: torchvision().models.efficientnet_b0(),
    "torchvision v2_s": lambda: torchvision().models.efficientnet_v2_s(),
    "timm b0": lambda: timm().create_model("efficientnet_b0", drop_path_rate=0.2),
    "timm v2_s": lambda: timm().create_model("tf_efficientnetv2_s", drop_path_rate=0.2),
}

# One MBConv with a shortcut, [N, channels, H, W] -> the same shape, and its number of channels.
BLOCKS = {
    "torchvision": lambda: (torchvision().models.efficientnet_b0().features[2][1], 24),
    "timm": lambda: (timm().create_model("efficientnet_b0", drop_path_rate=0.2).blocks[1][1], 24),
}


def calibrated(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """With the running statistics of `x`: a fresh model's activations would blow up in eval."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model
