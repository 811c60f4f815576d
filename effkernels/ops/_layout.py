"""Memory layout: an output is laid out as its input is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def empty_map(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised map of the dtype, device and layout of `x`; PyTorch decides where strides are ambiguous."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x))
