"""Watching the blocks of a model as they run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

Watch = Callable[[str, Any], None]  # of a block's name, and its inputs or outputs


@contextmanager
def around_blocks(model: nn.Module, blocks: Sequence[str], before: Watch, after: Watch) -> Iterator[None]:
    """Call `before(name, inputs)` and `after(name, outputs)` around each call of the submodules named `blocks`."""

    def hook(call: Watch, name: str, _: nn.Module, *values: Any) -> None:
        call(name, values[-1])

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
