"""Watching the blocks of a model as they run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def around_blocks(
    model: nn.Module, blocks: Sequence[str], before: Callable[[str], None], after: Callable[[str], None]
) -> Iterator[None]:
    """Call `before(name)` and `after(name)` around each call of the submodules named `blocks`."""

    def hook(call: Callable[[str], None], name: str, *_: Any) -> None:
        call(name)

    handles = []
    for name in blocks:
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(partial(hook, before, name)),
            module.register_forward_hook(partial(hook, after, name)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
