"""What every test gets: fresh memory full of NaN, a fixed seed, a skip with its reason where hardware is missing."""

import ctypes
import os
import sys

import pytest
import torch
from hypothesis import settings

# Of the cases that hypothesis draws: the same ones every time, and as long as each takes.
settings.register_profile("effkernels", derandomize=True, deadline=None)
settings.load_profile("effkernels")

# Triton chooses between interpreter and compiler when it is imported, so its tests have a process of their own, as have
# those under the sanitisers: tests/ops/test_triton_interpreter.py and test_cuda_on_cpu.py start them.
collect_ignore = [
    folder
    for folder, variable in (("interp", "TRITON_INTERPRET"), ("cuda_on_cpu", "EFFKERNELS_CUDA_ON_CPU"))
    if not os.environ.get(variable)
]

M_PERTURB = -6  # of glibc's <malloc.h>


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(request):
    """Fill what malloc gives out with 0xFF bytes, a NaN in every float format: an output left unwritten shows.

    Unlike torch.utils.deterministic.fill_uninitialized_memory, this reaches scratch memory of C++ and the tensors of
    `aoti_torch_empty_strided`, and changes no algorithm. On the GPU there is only the former.
    """
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_PERTURB, 0x100)  # memory is filled with the low byte of ~value
    if on_gpu:
        torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    if on_gpu:
        torch.use_deterministic_algorithms(False)
    if sys.platform == "linux":
        mallopt(M_PERTURB, 0)
