"""Training on the CUDA backend: ops whose backward pass runs on its kernels, executed by ptxrun."""

import emulated_cuda
import pytest
import torch

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


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_dwconv_bn_swish(monkeypatch, layout):
    monkeypatch.setitem(backends.DEVICES, "cuda", ("cpu",))
    monkeypatch.setitem(_native.MISSING, "cuda", None)
    emulated_cuda.options.clear()
    emulated_cuda.launches.clear()
    with emulated_cuda.installed():
        got = gradients("cuda", torch.float32, layout)
    kernels = " ".join(launch.kernel for launch in emulated_cuda.launches)
    assert "dwconv_backward" in kernels and "batch_norm" in kernels
    eager, exact = (gradients("eager", dtype, layout) for dtype in (torch.float32, torch.float64))
    for tensors in zip(got, eager, exact, strict=True):
        assert_close_to_reference(*tensors)
