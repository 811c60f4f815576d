"""`dwconv_bn_swish` in inference, fp32, batch 8."""

import pytest
import suite
import torch
import torch.nn.functional as F
from suite import KERNELS, LAYOUTS, Shape
from torch import Tensor

from effkernels.ops import dwconv_bn_swish
from effkernels.ops._cases import assert_close_to_reference

SHAPES = suite.shapes("efficientnet_b0")


def arguments(shape: Shape, layout: str) -> tuple[Tensor, ...]:
    c, size, k = shape.channels, shape.size, shape.kernel_size
    x = torch.randn(suite.BATCH, c, size, size).contiguous(memory_format=LAYOUTS[layout])
    return x, torch.randn(c, 1, k, k), torch.rand(c) + 0.5, torch.randn(c), torch.randn(c), torch.rand(c) + 0.5


def eager(shape: Shape, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    d = F.conv2d(x, weight, stride=shape.stride, padding=shape.kernel_size // 2, groups=shape.channels)
    return F.silu(F.batch_norm(d, mean, var, gamma, beta), inplace=True)


def variant(implementation: str, shape: Shape, layout: str):
    """A call of `implementation` that is known to be right."""
    inputs = arguments(shape, layout)
    expected = eager(shape, *inputs)
    if implementation == "eager":
        return lambda: eager(shape, *inputs)
    call = suite.on(implementation, lambda: dwconv_bn_swish(*inputs, stride=shape.stride))
    assert_close_to_reference(call(), expected, eager(shape, *(t.double() for t in inputs)))
    return call


@pytest.mark.benchmark(max_time=0.2, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize("implementation", ["eager", *KERNELS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dwconv(benchmark, shape, layout, implementation):
    benchmark.group = f"dwconv_bn_swish {shape}"
    benchmark(variant(implementation, shape, layout))


@pytest.mark.benchmark(group="dwconv_bn_swish against eager")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dwconv_ratio(benchmark, shape, backend):
    calls = {(name, layout): variant(name, shape, layout) for name in ("eager", backend) for layout in LAYOUTS}
    suite.compare(benchmark, calls, shape.target)
