"""A network by name."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from effkernels.models import create_model, list_models
from effkernels.models.configs import CONFIGS


class UnknownModel(ValueError):
    """There is no model of this name."""


SIZE = 224  # of images, where a network does not say


def find_model(name: str) -> tuple[nn.Module, int]:
    """A network with fresh weights, and the height and width of its images.

    Args:
        name: of a model of torchvision, timm or effkernels, the first of them that has it, or with one of these
            before a colon, such as timm:resnet18; or module:function, the function returning an `nn.Module`.

    Raises:
        UnknownModel: there is nothing of this name, or the function returns something else.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix not in _LIBRARIES:
        return _call(prefix, rest), SIZE
    libraries = [prefix] if colon else [*_LIBRARIES]
    wanted = rest if colon else name
    known: list[str] = []
    for library in libraries:
        names, create = _LIBRARIES[library]
        try:
            found = names()
        except ModuleNotFoundError:
            continue  # it is not installed
        if wanted in found:
            return create(wanted)
        known += found
    if not known:
        raise UnknownModel(f"{prefix} is not installed, got {name!r}")
    raise UnknownModel(
        f"must be a model of {', '.join(libraries)}" + ("" if colon else ", or module:function") + f", got {name!r}"
        f"{_close(wanted, known)}"
    )


def _call(module: str, function: str) -> nn.Module:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not module.startswith(missing.name):
            raise  # something that the module needs
        libraries = ", ".join(f"{library}:" for library in _LIBRARIES)
        raise UnknownModel(
            f"must begin with a module that can be imported, or {libraries}, got '{module}:{function}'"
        ) from None
    make = getattr(found, function, None)
    if not callable(make):
        names = [key for key, value in vars(found).items() if callable(value)]
        raise UnknownModel(f"must name a function of {module}, got {function!r}{_close(function, names)}")
    model = make()
    if not isinstance(model, nn.Module):
        raise UnknownModel(f"{module}:{function} must return an nn.Module, got {type(model).__name__}")
    return model


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=4)
    return f"; close to it: {', '.join(close)}" if close else ""


def _of_torchvision(name: str) -> tuple[nn.Module, int]:
    from torchvision import models

    weights = [*models.get_model_weights(name)]
    size = weights[-1].transforms.keywords.get("crop_size", SIZE) if weights else SIZE
    return models.get_model(name, weights=None), size


def _names_of_torchvision() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _of_timm(name: str) -> tuple[nn.Module, int]:
    import timm

    config = timm.get_pretrained_cfg(name)
    return timm.create_model(name), config.input_size[-1] if config else SIZE


def _names_of_timm() -> list[str]:
    import timm

    return timm.list_models()


def _of_effkernels(name: str) -> tuple[nn.Module, int]:
    return create_model(name), CONFIGS[name].resolution


_LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], tuple[Any, int]]]] = {
    "torchvision": (_names_of_torchvision, _of_torchvision),
    "timm": (_names_of_timm, _of_timm),
    "effkernels": (list_models, _of_effkernels),
}
