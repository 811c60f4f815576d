"""Memory traffic, counted: what the launched ops read and write, from the shapes of their tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effkernels.ops._op import COMPOSITIONS, OPS
from effkernels.profiling._hooks import around_blocks


class _Counter(TorchDispatchMode):
    """Our ops say what they read and write. Every other reads each tensor that it is given once, and writes each tensor
    that it returns or alters once.

    That is how elementwise, normalising and convolving kernels work in inference, where the tensors exceed the caches.
    Copies inside a library's kernel and rows that a window reads again are not seen. Fusions are counted by their
    phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITIONS:
            with self:
                return COMPOSITIONS[func](*args, **kwargs)
        result = func(*args, **kwargs)
        if func in OPS:
            self.bytes += sum(OPS[func].bytes(args, result).values())
        elif not (func.is_view or "empty" in func.__name__):
            self.bytes += _size((args, kwargs)) + _size(result)
        return result


def _size(values: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))


def count_bytes(function: Callable[..., Any], *args: Any) -> int:
    """The bytes that the ops of `function(*args)` read and write, weights included. Inference only."""
    with torch.no_grad(), _Counter() as counter:
        function(*args)
    return counter.bytes


def block_bytes(model: nn.Module, blocks: Sequence[str], x: Tensor) -> dict[str, int]:
    """The bytes that each of the submodules named `blocks` reads and writes in one inference of `model` on `x`."""
    found: dict[str, int] = {}
    counter = _Counter()

    def before(name: str) -> None:
        found[name] = -counter.bytes

    def after(name: str) -> None:
        found[name] += counter.bytes

    with around_blocks(model, blocks, before, after), torch.no_grad(), counter:
        model(x)
    return found
