"""What a block is made of: its child modules, read at each call and found to be just what the kernels compute."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effkernels.nn.layers import Conv2dSame, DropPath
from effkernels.ops.dwconv import KERNEL_SIZES, STRIDES

# Adapters add what their libraries have of each kind.
SAME_PADDED: set[type] = {Conv2dSame}
ACTIVATIONS: dict[type, str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Identity: "identity",
}
DROP_PATHS: set[type] = {DropPath, nn.Identity}
GATES: dict[type, str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}


class Unfusable(Exception):
    """`module`, a part of a block, does something that the fused ops would skip."""

    def __init__(self, module: nn.Module | None, reason: str) -> None:
        super().__init__(f"{type(module).__qualname__} {reason}")
        self.module = module
        self.reason = reason


BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


class Layer(NamedTuple):
    """activation(bn(conv(x)))"""

    conv: nn.Conv2d
    bn: BatchNorm
    activation: str


class SE(NamedTuple):
    """Squeeze-excite: x * gate(expand(activation(reduce(mean of x over its map))))"""

    reduce: nn.Conv2d
    expand: nn.Conv2d
    activation: str
    gate: str


class Block(NamedTuple):
    """project(se(depthwise(expand(x)))), without those that are None, and the shortcut.

    `shortcut` is None or how the shortcut is added to the branch after `drop_path`: `operator.iadd` keeps the branch's
    dtype, `operator.add` promotes.
    """

    expand: Layer | None
    depthwise: Layer | None
    se: SE | None
    project: Layer | None
    drop_path: nn.Module
    shortcut: Callable[[Tensor, Tensor], Tensor] | None

    def layers(self) -> Iterator[Layer]:
        return (layer for layer in (self.expand, self.depthwise, self.project) if layer is not None)


def own(module: Any, *types: type) -> Any:
    """`module`, which is of one of `types` and runs as its class says.

    Raises:
        Unfusable: another type (replaced, parametrised, quantised), hooks (pruning too), or a forward of its own.
    """
    if type(module) not in types:
        raise Unfusable(module, f"takes the place of a {types[0].__qualname__}")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Unfusable(module, "has hooks")
    if "forward" in module.__dict__:
        raise Unfusable(module, "has a forward method of its own")
    return module


def passes(drop_path: nn.Module) -> bool:
    """Whether `drop_path` gives out what it is given: in inference, if it is one that we know."""
    try:
        return not own(drop_path, *DROP_PATHS).training
    except Unfusable:
        return False


def activation(module: nn.Module) -> str:
    return _named(module, ACTIVATIONS)


def gate(module: nn.Module) -> str:
    return _named(module, GATES)


def _named(module: nn.Module, names: dict[type, str]) -> str:
    name = names.get(type(module))
    if name is None:
        raise Unfusable(module, "is computed by no kernel")
    own(module, type(module))
    return name


def conv(module: nn.Module) -> nn.Conv2d:
    """Any convolution that PyTorch's library runs."""
    found: nn.Conv2d = own(module, nn.Conv2d, *SAME_PADDED)
    if is_traceable_wrapper_subclass(found.weight):
        raise Unfusable(module, f"has a {type(found.weight).__qualname__} as weight")
    return found


def pointwise(module: nn.Module) -> nn.Conv2d:
    """A 1x1 convolution, whose BatchNorm may be folded into its weight."""
    found = conv(module)
    if not is_pointwise(found):
        raise Unfusable(module, "is not a plain 1x1 convolution")
    return found


def is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def scales_images(drop_path: nn.Module) -> bool:
    """Whether `drop_path` may be replaced by the factors that it gives to ones: it is known, and nobody watches it."""
    try:
        own(drop_path, *DROP_PATHS)
    except Unfusable:
        return False
    return True


def depthwise_layer(conv: nn.Conv2d, bn: BatchNorm, activation: str) -> Layer:
    """A layer whose convolution `dwconv_bn_swish` computes."""
    k, stride = conv.kernel_size[0], conv.stride[0]
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise Unfusable(conv, f"is not depthwise: {conv.groups} groups of {conv.in_channels} channels")
    if conv.kernel_size != (k, k) or k not in KERNEL_SIZES:
        raise Unfusable(conv, f"has kernel size {conv.kernel_size}; the kernels have {KERNEL_SIZES}")
    if conv.stride != (stride, stride) or stride not in STRIDES:
        raise Unfusable(conv, f"has stride {conv.stride}; the kernels have {STRIDES}")
    if conv.dilation != (1, 1):
        raise Unfusable(conv, f"has dilation {conv.dilation}")
    if conv.bias is not None:
        raise Unfusable(conv, "has a bias")
    if conv.padding_mode != "zeros":
        raise Unfusable(conv, f"has padding mode {conv.padding_mode!r}")
    if conv.padding == "valid" or conv.padding[0] != conv.padding[-1]:
        raise Unfusable(conv, f"has padding {conv.padding}")
    return Layer(conv, bn, activation)


def projection(conv: nn.Conv2d, bn: BatchNorm, activation: str) -> Layer:
    """A 1x1 convolution and its BatchNorm, with no activation."""
    if activation != "identity":
        raise Unfusable(bn, f"is followed by {activation}")
    return Layer(pointwise(conv), bn, activation)


def padding(conv: nn.Conv2d) -> int | str:
    """The padding of a `depthwise` convolution, as `dwconv_bn_swish` takes it."""
    return "same" if type(conv) in SAME_PADDED or conv.padding == "same" else conv.padding[0]


def batch_norm(module: nn.Module) -> BatchNorm:
    found: BatchNorm = own(module, nn.BatchNorm2d, nn.SyncBatchNorm)
    return found


def uses_batch_statistics(bn: BatchNorm) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def process_group(bn: BatchNorm) -> Any:
    """With whom `bn` shares batch statistics; None for nobody."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def requires_grad(layers: Iterator[Layer], se: SE | None) -> bool:
    tensors: list[Tensor | None] = [] if se is None else [*_parameters(se.reduce), *_parameters(se.expand)]
    for layer in layers:
        tensors += *_parameters(layer.conv), *_parameters(layer.bn)
    return any(t is not None and t.requires_grad for t in tensors)


def _parameters(module: nn.Conv2d | BatchNorm) -> tuple[Tensor, Tensor | None]:
    return module.weight, module.bias


def global_hooks() -> bool:
    """Whether hooks are registered for every module, which would not see those that a fused op replaces."""
    return torch.nn.modules.module._has_any_global_hook()
