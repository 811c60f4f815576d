"""Fused kernels for EfficientNet-style networks."""

from effkernels import models, ops
from effkernels.backends import use_backend
from effkernels.explain import explain
from effkernels.nn import (
    DepthwiseConvBNAct,
    FusedMBConv,
    MBConv,
    SqueezeExcite,
    Swish,
    autotune,
    conversion_report,
    convert,
    freeze,
    graph,
    revert,
    unfreeze,
)

__version__ = "0.1.0"
__all__ = [
    "DepthwiseConvBNAct",
    "FusedMBConv",
    "MBConv",
    "SqueezeExcite",
    "Swish",
    "autotune",
    "conversion_report",
    "convert",
    "explain",
    "freeze",
    "graph",
    "models",
    "ops",
    "revert",
    "unfreeze",
    "use_backend",
]
