"""Running as a GPU would, with no GPU and nothing computed: on the meta device."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn

from effkernels import _native, backends
from effkernels.profiling.workload import Workload

GPU_BACKEND = "cuda"  # the one that is modelled


def on_meta(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype, *, train: bool = False, backend: str = "auto"
) -> Workload:
    """A workload that is a copy of `model` and an input without data."""
    model = copy.deepcopy(model).to("meta", dtype)
    return Workload(model, torch.empty(tuple(shape), dtype=dtype, device="meta"), train, backend)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """GPU backends that are asked for take meta tensors, whether or not they are installed."""
    gpu = ("cuda", "triton")
    with (
        mock.patch.dict(backends.DEVICES, dict.fromkeys(gpu, ("meta",))),
        mock.patch.dict(_native.MISSING, dict.fromkeys(gpu)),
    ):
        yield
