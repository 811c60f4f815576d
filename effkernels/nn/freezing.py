"""Weights packed once, for the fastest inference on the CPU."""

from typing import TypeVar

from torch import nn

from effkernels.nn import parts
from effkernels.nn.fusion import Frozen, Fused, packed
from effkernels.nn.parts import Block, Layer, Unfusable

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model) -> Model:
    """Fix the blocks and layers of a converted model as they are now, for the fastest inference on the CPU, in place.

    Their weights are rearranged once instead of at each call, and their parts no longer looked at: hooks and
    alterations inside them have no effect. The parameters stay, so that `state_dict`, `unfreeze` and `revert` work. A
    frozen block raises when it is called in training mode, for a gradient, or after a parameter or buffer has been
    changed in place (by an optimiser, `load_state_dict`); one that is replaced by another is not noticed. Blocks that
    are altered, and those whose convolutions run in PyTorch's library, run as before. Pickling unfreezes.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: it has nothing to freeze, or a block that uses batch statistics or is not on the CPU.
    """
    _check("freeze", model)
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, Fused):
            continue
        try:
            found = module.read_parts()
        except Unfusable:
            continue
        if not isinstance(found, Block | Layer):
            continue
        layers = [found] if isinstance(found, Layer) else list(found.layers())
        if any(parts.uses_batch_statistics(layer.bn) for layer in layers):
            raise ValueError(f"freeze: {name or 'the model'} uses batch statistics; call eval() first")
        device = layers[0].conv.weight.device
        if device.type != "cpu":
            raise ValueError(
                f"freeze: {name or 'the model'} must be on the CPU, got {device}; effkernels.graph is for a GPU"
            )
        run = packed(found)
        if run is not None:
            module.__dict__["_frozen"] = Frozen(run, [*module.parameters(), *module.buffers()])
            count += 1
    if not count:
        raise ValueError(f"freeze: {type(model).__qualname__} has nothing to freeze; effkernels.convert comes first")
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


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
