"""timm's EfficientNet blocks, fused."""

import operator
from collections.abc import Callable
from typing import Any

from timm.layers import activations
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from timm.models import _efficientnet_blocks as blocks
from torch import nn

from effkernels.nn import parts
from effkernels.nn.fusion import FusedBlock, FusedSE
from effkernels.nn.parts import SE, Block, Layer, Unfusable

parts.SAME_PADDED.add(Conv2dSame)
parts.DROP_PATHS.add(DropPath)
parts.ACTIVATIONS |= {activations.Swish: "silu", activations.HardSwish: "hardswish"}
parts.GATES |= {activations.Sigmoid: "sigmoid", activations.HardSigmoid: "hardsigmoid"}


class SqueezeExcite(FusedSE, blocks.SqueezeExcite):
    unfused = blocks.SqueezeExcite.forward

    def read_parts(self) -> SE:
        return SE(
            parts.pointwise(self.conv_reduce),
            parts.pointwise(self.conv_expand),
            parts.activation(self.act1),
            parts.gate(self.gate),
        )


class InvertedResidual(FusedBlock, blocks.InvertedResidual):
    unfused = blocks.InvertedResidual.forward

    def read_parts(self) -> Block:
        _nothing(self.conv_s2d)
        parts.own(self.aa, nn.Identity)
        return Block(
            _layer(self.conv_pw, self.bn1),
            parts.depthwise_layer(*_layer(self.conv_dw, self.bn2)),
            _squeeze_excite(self.se),
            parts.projection(*_layer(self.conv_pwl, self.bn3)),
            self.drop_path,
            _shortcut(self),
        )


class DepthwiseSeparableConv(FusedBlock, blocks.DepthwiseSeparableConv):
    unfused = blocks.DepthwiseSeparableConv.forward

    def read_parts(self) -> Block:
        _nothing(self.conv_s2d)
        parts.own(self.aa, nn.Identity)
        return Block(
            None,
            parts.depthwise_layer(*_layer(self.conv_dw, self.bn1)),
            _squeeze_excite(self.se),
            parts.projection(*_layer(self.conv_pw, self.bn2)),
            self.drop_path,
            _shortcut(self),
        )


class EdgeResidual(FusedBlock, blocks.EdgeResidual):
    unfused = blocks.EdgeResidual.forward

    def read_parts(self) -> Block:
        parts.own(self.aa, nn.Identity)
        return Block(
            _layer(self.conv_exp, self.bn1),
            None,
            _squeeze_excite(self.se),
            parts.projection(*_layer(self.conv_pwl, self.bn2)),
            self.drop_path,
            _shortcut(self),
        )


class ConvBnAct(FusedBlock, blocks.ConvBnAct):
    """The Fused-MBConv with expansion ratio 1."""

    unfused = blocks.ConvBnAct.forward

    def read_parts(self) -> Block:
        parts.own(self.aa, nn.Identity)
        return Block(_layer(self.conv, self.bn1), None, None, None, self.drop_path, _shortcut(self))


def _layer(conv: nn.Module, bn: nn.Module) -> Layer:
    norm = parts.own(bn, BatchNormAct2d, SyncBatchNormAct)
    parts.own(norm.drop, nn.Identity)
    return Layer(parts.conv(conv), norm, parts.activation(norm.act))


def _squeeze_excite(se: nn.Module) -> SE | None:
    if type(se) is nn.Identity:
        parts.own(se, nn.Identity)
        return None
    return SqueezeExcite.read_parts(parts.own(se, SqueezeExcite, blocks.SqueezeExcite))


def _nothing(space_to_depth: nn.Module | None) -> None:
    if space_to_depth is not None:
        raise Unfusable(space_to_depth, "turns space to depth")


def _shortcut(block: Any) -> Callable[..., Any] | None:
    return operator.add if block.has_skip else None


CONVERTED = {
    blocks.InvertedResidual: InvertedResidual,
    blocks.DepthwiseSeparableConv: DepthwiseSeparableConv,
    blocks.EdgeResidual: EdgeResidual,
    blocks.ConvBnAct: ConvBnAct,
    blocks.SqueezeExcite: SqueezeExcite,
}
