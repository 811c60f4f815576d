"""Training on the CUDA backend: ops whose backward pass runs on its kernels, executed by ptxrun."""

from contextlib import ExitStack

import emulated_cuda
import pytest
import torch
from nn.runs import assert_as_close_as_eager, forward_backward

import effkernels
from effkernels import _native, backends, ops
from effkernels.ops._cases import assert_close_to_reference

if reason := emulated_cuda.why_not():
    pytest.skip(reason, allow_module_level=True)


def gradients(backend, dtype, layout):
    """Of x, the weight and BatchNorm's parameters, with a gradient for the mean over the map too."""
    torch.manual_seed(0)
    shapes = ((2, 8, 10, 12), (8, 1, 5, 5), (8,), (8,))
    x, *parameters = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    with effkernels.use_backend(backend):
        y, mean = ops.dwconv_bn_swish(
            x.to(memory_format=layout), *parameters, None, None, training=True, stride=2, return_pooled=True
        )
        ((y * torch.randn(y.shape).to(dtype)).sum() + (mean * torch.randn(mean.shape).to(mean.dtype)).sum()).backward()
    return [t.grad for t in (x, *parameters)]


@pytest.fixture
def emulation(monkeypatch):
    """Where the backend takes CPU tensors while a test runs."""
    monkeypatch.setitem(backends.DEVICES, "cuda", ("cpu",))
    monkeypatch.setitem(_native.MISSING, "cuda", None)
    emulated_cuda.options.clear()
    emulated_cuda.launches.clear()
    with ExitStack() as stack:
        stack.enter_context(emulated_cuda.installed())
        yield stack


def launched():
    return " ".join(launch.kernel for launch in emulated_cuda.launches)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_dwconv_bn_swish(emulation, layout):
    got = gradients("cuda", torch.float32, layout)
    kernels = launched()
    assert "dwconv_backward" in kernels and "batch_norm" in kernels
    eager, exact = (gradients("eager", dtype, layout) for dtype in (torch.float32, torch.float64))
    for tensors in zip(got, eager, exact, strict=True):
        assert_close_to_reference(*tensors)


BLOCKS = {
    "MBConv": lambda: effkernels.MBConv(8, 8, kernel_size=5, expand_ratio=2, drop_path=0.2),
    "MBConv, minimal memory": lambda: effkernels.MBConv(8, 8, kernel_size=5, expand_ratio=2, memory="minimal"),
    "MBConv, strided": lambda: effkernels.MBConv(8, 12, stride=2, expand_ratio=2, se_ratio=0),
    "FusedMBConv": lambda: effkernels.FusedMBConv(8, 8, expand_ratio=2, se_ratio=0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_one_op_beside_triton(monkeypatch, emulation, name):
    """Phases that have no CUDA kernel are Triton's."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setitem(backends.DEVICES, "triton", ("cpu",))
    triton = emulation.enter_context(emulated_cuda.ptxrun.triton_fixture(80))
    layout = torch.contiguous_format if "strided" in name else torch.channels_last
    x = torch.randn(2, 8, 9, 10).half().contiguous(memory_format=layout)
    with effkernels.use_backend("cuda"), backends.record_decisions() as decisions:
        assert_as_close_as_eager(forward_backward, BLOCKS[name]().half(), [x])
    op = "mbconv" if name.startswith("MBConv") else "bn_project"
    assert (op, ("cuda", "triton")) in [(d.op, d.kernels) for d in decisions]
    assert "dwconv_backward" in launched() or op == "bn_project"
    assert ("expand_dwconv" in launched()) == ("minimal" in name)
    assert "batch_norm" in launched()
    assert triton.results
