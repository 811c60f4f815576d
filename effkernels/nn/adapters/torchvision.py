"""torchvision's EfficientNet blocks, fused."""

import operator

from torch import Tensor, nn
from torchvision.models import efficientnet
from torchvision.ops import StochasticDepth, misc

from effkernels.nn import parts
from effkernels.nn.fusion import Fused, FusedBlock, FusedSE, run_conv
from effkernels.nn.parts import SE, Block, Layer, Unfusable

parts.DROP_PATHS.add(StochasticDepth)


class SqueezeExcitation(FusedSE, misc.SqueezeExcitation):
    unfused = misc.SqueezeExcitation.forward

    def read_parts(self) -> SE:
        return _squeeze_excite(self)


class MBConv(FusedBlock, efficientnet.MBConv):
    block: nn.Sequential
    stochastic_depth: nn.Module
    unfused = efficientnet.MBConv.forward

    def read_parts(self) -> Block:
        layers = list(parts.own(self.block, nn.Sequential))
        if len(layers) not in (3, 4):
            raise Unfusable(self.block, f"has {len(layers)} layers in place of 3 or 4")
        *expand, depthwise, se, project = layers
        parts.own(se, SqueezeExcitation, misc.SqueezeExcitation)
        return Block(
            _layer(expand[0]) if expand else None,
            parts.depthwise_layer(*_layer(depthwise)),
            _squeeze_excite(se),
            parts.projection(*_layer(project)),
            self.stochastic_depth,
            operator.iadd if self.use_res_connect else None,
        )


class FusedMBConv(FusedBlock, efficientnet.FusedMBConv):
    block: nn.Sequential
    stochastic_depth: nn.Module
    unfused = efficientnet.FusedMBConv.forward

    def read_parts(self) -> Block:
        layers = list(parts.own(self.block, nn.Sequential))
        if len(layers) not in (1, 2):
            raise Unfusable(self.block, f"has {len(layers)} layers in place of 1 or 2")
        expand, *project = layers
        return Block(
            _layer(expand),
            None,
            None,
            parts.projection(*_layer(project[0])) if project else None,
            self.stochastic_depth,
            operator.iadd if self.use_res_connect else None,
        )


class Conv2dNormActivation(Fused, misc.Conv2dNormActivation):
    """The stem, the head, and the layers of a block that runs as its own forward says."""

    unfused = misc.Conv2dNormActivation.forward

    def read_parts(self) -> Layer:
        return _layer_of(self)  # its own hooks see what it takes and returns

    def fused(self, layer: Layer, x: Tensor) -> Tensor:
        return run_conv(layer, x)


def _layer(module: nn.Module) -> Layer:
    return _layer_of(parts.own(module, Conv2dNormActivation, misc.Conv2dNormActivation))


def _layer_of(module: nn.Sequential) -> Layer:
    children = list(module)
    if len(children) not in (2, 3):
        raise Unfusable(module, f"has {len(children)} layers in place of 2 or 3")
    conv, bn, *act = children
    return Layer(parts.conv(conv), parts.batch_norm(bn), parts.activation(act[0]) if act else "identity")


def _squeeze_excite(se: misc.SqueezeExcitation) -> SE:
    pool = parts.own(se.avgpool, nn.AdaptiveAvgPool2d)
    if pool.output_size not in (1, (1, 1)):
        raise Unfusable(pool, f"has output size {pool.output_size}")
    return SE(
        parts.pointwise(se.fc1),
        parts.pointwise(se.fc2),
        parts.activation(se.activation),
        parts.gate(se.scale_activation),
    )


CONVERTED = {
    efficientnet.MBConv: MBConv,
    efficientnet.FusedMBConv: FusedMBConv,
    misc.Conv2dNormActivation: Conv2dNormActivation,
    misc.SqueezeExcitation: SqueezeExcitation,
}
