"""Networks for the tests of `effkernels profile`."""

import torchvision
from torch import nn

import effkernels


def small() -> nn.Module:
    """An expansion, a shortcut, a stride; blocks of ours, and layers of PyTorch around them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, 4, padding=3),
        effkernels.MBConv(8, 8, kernel_size=3, expand_ratio=4, se_ratio=0.25),
        effkernels.MBConv(8, 12, kernel_size=5, stride=2, expand_ratio=4, se_ratio=0.25),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def block() -> nn.Module:
    return effkernels.MBConv(3, 3, kernel_size=3, expand_ratio=4, se_ratio=0.5)


def without_ours() -> nn.Module:
    return torchvision.models.squeezenet1_1()


def no_module() -> int:
    return 0
