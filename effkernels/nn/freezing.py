"""Weights packed once, for the fastest inference on the CPU."""

from typing import TypeVar

from torch import nn

from effkernels.nn import parts
from effkernels.nn.fusion import Frozen, FusedBlock, adds_x, block_arguments
from effkernels.nn.parts import Block, Unfusable
from effkernels.ops.mbconv_inference import pack

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model) -> Model:
    """Fix the MBConv blocks of a converted model as they are now, for the fastest inference on the CPU, in place.

    Their weights are rearranged once instead of at each call, and their parts no longer looked at: hooks and
    alterations inside them have no effect. The parameters stay, so that `state_dict`, `unfreeze` and `revert` work. A
    frozen block raises when it is called in training mode, for a gradient, or after a parameter or buffer has been
    changed in place (by an optimiser, `load_state_dict`); one that is replaced by another is not noticed. Blocks that
    are altered or have no depthwise convolution run as before. Pickling unfreezes.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: it has no MBConv block to freeze, or one in training mode.
    """
    _check("freeze", model)
    count = 0
    for name, module in model.named_modules():
        block = _whole(module)
        if block is None:
            continue
        if any(parts.uses_batch_statistics(layer.bn) for layer in block.layers()):
            raise ValueError(f"freeze: {name or 'the model'} uses batch statistics; call eval() first")
        if block.shortcut is not None and not adds_x(block):
            continue
        tensors = [*module.parameters(), *module.buffers()]
        module.__dict__["_frozen"] = Frozen(pack(**block_arguments(block)), adds_x(block), tensors)
        count += 1
    if not count:
        raise ValueError(
            f"freeze: {type(model).__qualname__} has no MBConv block; effkernels.convert(model) comes first"
        )
    return model


def unfreeze(model: Model) -> Model:
    """Undo `freeze`, in place: the blocks follow their parameters again.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    _check("unfreeze", model)
    for module in model.modules():
        module.__dict__.pop("_frozen", None)
    return model


def _whole(module: nn.Module) -> Block | None:
    """The parts of a block that is one op in inference."""
    if not isinstance(module, FusedBlock):
        return None
    try:
        block: Block = module.read_parts()
    except Unfusable:
        return None
    return None if block.depthwise is None or block.project is None else block


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
