"""Fused kernels for EfficientNet-style networks."""

from effkernels import ops
from effkernels.backends import use_backend
from effkernels.nn import DepthwiseConvBNAct, FusedMBConv, MBConv, SqueezeExcite, Swish

__version__ = "0.1.0"
__all__ = [
    "DepthwiseConvBNAct",
    "FusedMBConv",
    "MBConv",
    "SqueezeExcite",
    "Swish",
    "ops",
    "use_backend",
]
