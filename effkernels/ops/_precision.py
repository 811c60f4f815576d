"""What float32 is multiplied in on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_chosen: ContextVar[bool | None] = ContextVar("tf32", default=None)
_library = torch.library.Library("effkernels", "FRAGMENT")


def allow_tf32() -> bool:
    """Whether products may round their operands to TF32: where PyTorch lets convolutions do so, as it does by default.

    That is set by `torch.backends.cudnn.allow_tf32`, or `torch.backends.cudnn.conv.fp32_precision`.
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    precision: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return precision == "tf32"


# The stable ABI does not know of that setting, so that launchers in C++ call this, for float32 only.
_library.define("allow_tf32() -> bool")
_library.impl("allow_tf32", allow_tf32, "CompositeExplicitAutograd")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """For ops called inside the block, whatever PyTorch's setting; that is not touched."""
    token = _chosen.set(allowed)
    try:
        yield
    finally:
        _chosen.reset(token)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Float32 values to the 10 bits of mantissa that TF32 keeps, halves away from zero."""
    bits = (x.view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), bits.view(torch.float32), x)
