"""`squeeze_excite` in inference, fp32, batch 8, on the outputs of depthwise convolutions."""

import pytest
import suite
import torch
import torch.nn.functional as F
from suite import KERNELS, LAYOUTS, Shape
from torch import Tensor

from effkernels.ops import squeeze_excite
from effkernels.ops._cases import assert_close_to_reference

# One of each output: (channels, size, squeezed channels).
SHAPES = [*{(s.channels, -(-s.size // s.stride), s.se_channels): s for s in suite.shapes("efficientnet_b0")}.values()]


def arguments(shape: Shape, layout: str) -> tuple[Tensor, ...]:
    c, size, r = shape.channels, -(-shape.size // shape.stride), shape.se_channels
    x = torch.randn(suite.BATCH, c, size, size).contiguous(memory_format=LAYOUTS[layout])
    return x, torch.randn(r, c, 1, 1) / c**0.5, torch.randn(r), torch.randn(c, r, 1, 1) / r**0.5, torch.randn(c)


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    squeezed = F.silu(F.conv2d(F.adaptive_avg_pool2d(x, 1), w1, b1), inplace=True)
    return x * torch.sigmoid(F.conv2d(squeezed, w2, b2))


def variant(implementation: str, shape: Shape, layout: str):
    """A call of `implementation` that is known to be right."""
    inputs = arguments(shape, layout)
    expected = eager(*inputs)
    if implementation == "eager":
        return lambda: eager(*inputs)
    call = suite.on(implementation, lambda: squeeze_excite(*inputs))
    assert_close_to_reference(call(), expected, eager(*(t.double() for t in inputs)))
    return call


@pytest.mark.benchmark(max_time=0.2, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize("implementation", ["eager", *KERNELS])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squeeze_excite(benchmark, shape, layout, implementation):
    benchmark.group = f"squeeze_excite {shape}"
    benchmark(variant(implementation, shape, layout))


@pytest.mark.benchmark(group="squeeze_excite against eager")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squeeze_excite_ratio(benchmark, shape, backend):
    calls = {(name, layout): variant(name, shape, layout) for name in ("eager", backend) for layout in LAYOUTS}
    suite.compare(benchmark, calls, None)
