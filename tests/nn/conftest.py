"""Every backend that can run on the CPU; `kernels` are those that fuse."""

import pytest
import torch

import effkernels
from effkernels import backends

KERNELS = [name for name in backends.PREFERENCE if "cpu" in backends.DEVICES.get(name, ())]


def _use(name):
    reason = backends.why_not(name, torch.empty(1))
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    with effkernels.use_backend(name):
        yield name


@pytest.fixture(params=KERNELS)
def kernels(request):
    yield from _use(request.param)


@pytest.fixture(params=[*KERNELS, "eager"])
def backend(request):
    yield from _use(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on maps this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
