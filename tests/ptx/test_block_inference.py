"""A block in inference on the GPU: its launches, and what they read and write."""

import emulated_cuda
import pytest
import torch

import effkernels
from effkernels import _native, backends
from effkernels.models import create_model
from effkernels.nn import MBConv
from effkernels.ops.mbconv_inference.cases import MbconvInference

if reason := emulated_cuda.why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def cuda_takes_cpu_tensors(monkeypatch):
    monkeypatch.setitem(backends.DEVICES, "cuda", ("cpu",))
    monkeypatch.setitem(_native.MISSING, "cuda", None)
    with effkernels.use_backend("cuda"):
        yield


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_v2_s"])
def test_at_most_three_launches_in_a_block(cuda_takes_cpu_tensors, name, layout):
    model = create_model(name).eval().half().to(memory_format=layout)
    launched: list[str] = []
    counts = []
    for module in model.modules():
        if isinstance(module, MBConv):
            module.register_forward_pre_hook(lambda *_: launched.clear())
            module.register_forward_hook(lambda *_: counts.append(list(launched)))
    with emulated_cuda.installed(lambda kernel, *rest: launched.append(kernel)), torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, dtype=torch.float16).to(memory_format=layout))
    assert len(counts) > 10
    assert all(1 < len(kernels) <= 3 for kernels in counts), counts


@pytest.mark.parametrize("allowed", [True, False])
def test_float32_is_multiplied_as_convolutions_are(allowed):
    case = MbconvInference(shape=(1, 16, 7, 7), outputs=16)
    emulated_cuda.options = {"profile": True}
    emulated_cuda.launches.clear()
    with emulated_cuda.installed(), torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        case.op("cuda", *case.arguments())
    products = [launch.result.profile.mma_flops for launch in emulated_cuda.launches if "gate" not in launch.kernel]
    assert [set(+flops) for flops in products] == [{"tf32"} if allowed else set()] * 2


@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_the_expanded_map_is_never_stored(layout):
    """The depthwise output is written once and read once; what else is made on the way is small."""
    n, c, size = 2, 24, 28
    case = MbconvInference(shape=(n, c, size, size), outputs=c, dtype=torch.float16, kernel_size=5, layout=layout)
    arguments = case.arguments()
    emulated_cuda.options = {"profile": True}
    emulated_cuda.launches.clear()
    with emulated_cuda.installed():
        y = case.op("cuda", *arguments)
    given = {t.data_ptr() for t in (*arguments, y) if isinstance(t, torch.Tensor)}
    stored, loaded = [], []
    for launch in emulated_cuda.launches:
        for address, name in launch.tensors.items():
            if address not in given:
                buffer = launch.result.profile.buffer(name)
                stored.append(round(buffer.unique_stored) * 32)
                loaded.append(round(buffer.unique_loaded) * 32)
    wide = n * 6 * c * size * size * 2
    for amounts in (stored, loaded):
        assert max(amounts) == wide
        assert sum(amounts) < 1.1 * wide
    assert len(emulated_cuda.launches) == 3
