"""The swap of an existing model's blocks to their fused forms, and back."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from effkernels.nn.freezing import unfreeze
from effkernels.nn.fusion import Fused, FusedBlock
from effkernels.nn.parts import Unfusable
from effkernels.ops.mbconv import check_memory

LIBRARIES = ("torchvision", "timm")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Entry:
    """A block of a model, or a part that has none: its name, its class, how it runs and why it is not fused."""

    name: str
    type: str
    status: Literal["fused", "altered", "left"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.type})" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class ConversionReport:
    """How each part of a model runs."""

    entries: tuple[Entry, ...]

    @property
    def fused(self) -> tuple[Entry, ...]:
        """Blocks that run on the fused ops."""
        return self._with("fused")

    @property
    def altered(self) -> tuple[Entry, ...]:
        """Converted blocks that run as their own forward says, because something inside them was altered."""
        return self._with("altered")

    @property
    def left(self) -> tuple[Entry, ...]:
        """Parts with parameters that are not converted."""
        return self._with("left")

    def _with(self, status: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.status == status)

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)} blocks"]
        for title, entries in (("converted, but altered", self.altered), ("left as they are", self.left)):
            if entries:
                lines += [f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


def convert(model: Model, *, memory: str | None = None) -> Model:
    """Run the MBConv, Fused-MBConv and squeeze-excite blocks of a torchvision or timm model on the fused ops, in place.

    Each block's class becomes a subclass of its own class: parameters, `state_dict` keys, hooks, modes and random draws
    stay as they are, and copying, pickling and wrapping work. A block that is altered from inside (hooks on its parts,
    parametrisations, pruning, replaced or quantised children) runs as its own forward says; see `conversion_report`.
    A second call changes nothing, but `memory` if it is given.

    Args:
        model: blocks of our own in it are taken as converted.
        memory: "minimal": in training, an MBConv does not keep its expanded map, the widest (`ops.mbconv`); or
            "default". None: as each block has it, at first the default.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not an `nn.Module`.
        ValueError: it has no such block, or `memory` is none of the above.
    """
    _check("convert", model)
    if memory is not None:
        check_memory("convert", memory)
    for module in model.modules():
        converted = _conversions(type(module)).get(type(module))
        if converted is not None:
            module.__class__ = converted
        if isinstance(module, FusedBlock) and memory is not None:
            module.memory = memory
    if not any(isinstance(module, Fused) for module in model.modules()):
        near = "; ".join(str(entry) for entry in conversion_report(model).left if entry.reason != _PLAIN)
        raise ValueError(
            f"convert: {type(model).__qualname__} has nothing to convert: no MBConv, Fused-MBConv or squeeze-excite "
            f"block of {' or '.join(LIBRARIES)}" + (f" ({near})" if near else "")
        )
    return model


def revert(model: Model) -> Model:
    """Give the blocks that `convert` rebound their own classes back, in place.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    _check("revert", model)
    unfreeze(model)
    for module in model.modules():
        for original, converted in _conversions(type(module)).items():
            if type(module) is converted:
                module.__class__ = original
                module.__dict__.pop("memory", None)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """Which blocks of `model` run fused, and which do not and why.

    Raises:
        TypeError: `model` is not an `nn.Module`.
    """
    _check("conversion_report", model)
    return ConversionReport(tuple(_entries(model, "")))


_PLAIN = "plain PyTorch layers"


def _entries(module: nn.Module, name: str) -> Iterator[Entry]:
    cls = type(module)
    if isinstance(module, Fused):
        reason = _obstacle(module)
        yield Entry(name, cls.__qualname__, "altered" if reason else "fused", reason)
        return
    near = next((base for base in cls.__mro__ if base in _conversions(base)), None)
    if near is cls:
        yield Entry(name, cls.__qualname__, "left", "not converted yet")
    elif near is not None:
        yield Entry(
            name, cls.__qualname__, "left", f"a subclass of {near.__qualname__}, which may compute something else"
        )
    elif not any(isinstance(m, Fused) or _is_block(type(m)) for m in module.modules()):
        if any(True for _ in module.parameters()):
            yield Entry(name, cls.__qualname__, "left", _PLAIN)
    else:
        for child_name, child in module.named_children():
            yield from _entries(child, f"{name}.{child_name}" if name else child_name)


def _obstacle(module: Fused) -> str:
    """Why a converted module does not run fused; empty if it does."""
    if "forward" in module.__dict__:
        return "it has a forward method of its own"
    try:
        module.read_parts()
    except Unfusable as altered:
        part = next((name for name, m in module.named_modules() if m is altered.module and name), "")
        return f"{part} {altered}".lstrip()
    return ""


def _is_block(cls: type) -> bool:
    return any(base in _conversions(base) for base in cls.__mro__)


def _conversions(cls: type) -> dict[type, type[Fused]]:
    """From the classes of the library that `cls` comes from, or was converted from, to their fused forms."""
    parts = cls.__module__.split(".")
    library = parts[3] if parts[:3] == ["effkernels", "nn", "adapters"] else parts[0]
    if library not in LIBRARIES:
        return {}
    table: dict[type, type[Fused]] = importlib.import_module(f"effkernels.nn.adapters.{library}").CONVERTED
    return table


def _check(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
