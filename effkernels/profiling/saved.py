"""What autograd keeps for the backward pass, counted."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(function: Callable[..., Any], *args: Any, parameters: Iterable[Tensor] = ()) -> list[int]:
    """The bytes of each storage that `function(*args)` keeps for its backward pass, without `parameters`."""
    given = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}  # by address, and alive, so that no other gets it

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args)
    return [storage.nbytes() for address, storage in kept.items() if address not in given]
