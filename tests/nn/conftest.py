"""Every backend that can run here; `kernels` are those that fuse.

Those of the GPU get tensors there: whatever a test makes while one is in use is made on its device.
"""

import pytest
import torch

import effkernels
from effkernels import backends

CPU = ["cpp", "triton"] if "cpu" in backends.DEVICES["triton"] else ["cpp"]
GPU = [pytest.param(name, id=f"{name} on a GPU", marks=pytest.mark.gpu) for name in ("cuda", "triton")]
KERNELS = [*CPU, *GPU]


def _use(request):
    name = request.param
    device = "cuda" if request.node.get_closest_marker("gpu") else "cpu"
    reason = backends.why_not(name, torch.empty(1, device=device))
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    with torch.device(device), effkernels.use_backend(name):
        yield name


@pytest.fixture(params=KERNELS)
def kernels(request):
    yield from _use(request)


@pytest.fixture(params=[*KERNELS, "eager"])
def backend(request):
    yield from _use(request)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on maps this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """Of eager convolutions on a GPU, which would round to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
