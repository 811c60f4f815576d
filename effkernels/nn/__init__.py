"""Modules built on the fused ops, and the swap of existing models to them."""

from effkernels.nn.convert import ConversionReport, conversion_report, convert, revert
from effkernels.nn.freezing import freeze, unfreeze
from effkernels.nn.graphs import graph
from effkernels.nn.layers import DropPath
from effkernels.nn.modules import ConvBNAct, DepthwiseConvBNAct, FusedMBConv, MBConv, SqueezeExcite, Swish
from effkernels.nn.tuning import autotune

__all__ = [
    "ConvBNAct",
    "ConversionReport",
    "DepthwiseConvBNAct",
    "DropPath",
    "FusedMBConv",
    "MBConv",
    "SqueezeExcite",
    "Swish",
    "autotune",
    "conversion_report",
    "convert",
    "freeze",
    "graph",
    "revert",
    "unfreeze",
]
