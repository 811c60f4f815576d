"""The MBConv block in training, forward and backward, by the Triton kernels in Triton's interpreter."""

import pytest
import torch

from effkernels import use_backend
from effkernels.nn import FusedMBConv
from effkernels.ops._cases import assert_close_to_reference
from effkernels.ops.bn_project import Stage
from effkernels.ops.mbconv import Gate, mbconv

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SEEDS = 5

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked off

# dtype, layout, kernel size, stride, expand, squeeze-excite, residual and drop-path, frozen stages
BLOCKS = {
    "whole": (f32, "channels_last", 3, 1, True, True, True, ()),
    "whole, in rows": (f16, "nchw", 3, 1, True, True, True, ()),
    "without squeeze-excite": (bf16, "channels_last", 5, 2, True, False, False, ()),
    "without expand": (f32, "nchw", 3, 2, False, True, False, ()),
    "without expand, with residual": (f16, "channels_last", 3, 1, False, True, True, ()),
    "frozen": (f32, "nchw", 3, 1, True, True, True, ("expand", "depthwise", "project")),
    "partly frozen": (bf16, "channels_last", 3, 1, True, True, True, ("depthwise",)),
}


def block(backend, dtype, given, layout, k, stride, expand, squeeze_excite, residual, frozen):
    """Output, gradients, and running statistics."""
    channels, outputs = 4, 4 if residual else 6
    hidden = 12 if expand else channels
    numbers = torch.Generator().manual_seed(given[1])
    leaves, running = [], []

    wide = torch.promote_types(dtype, f32)

    def tensor(*shape, dtype=wide, offset=0.0):
        # The same values for every dtype that computes: those that the given one holds.
        values = torch.randn(shape, generator=numbers) / max(1, shape[-1:][0]) ** 0.5 + offset
        leaves.append(values.to(given[0] if len(shape) == 4 else f32).to(dtype).requires_grad_())
        return leaves[-1]

    def stage(name, activation, *shape):
        size = shape[0]
        fixed = torch.zeros(size, dtype=wide), torch.ones(size, dtype=wide)
        running.append(fixed)
        weight = tensor(*shape, dtype=dtype)
        return Stage(
            weight, None, tensor(size, offset=1.0), tensor(size), *fixed, name not in frozen, 0.1, 1e-3, activation
        )

    x = tensor(2, channels, 5, 6, dtype=dtype)
    stages = (
        stage("expand", "silu", hidden, channels, 1, 1) if expand else None,
        stage("depthwise", "silu", hidden, 1, k, k),
        Gate(tensor(2, hidden, 1, 1), tensor(2), tensor(hidden, 2, 1, 1), tensor(hidden), "silu", "sigmoid")
        if squeeze_excite
        else None,
        stage("project", "identity", outputs, hidden, 1, 1),
    )
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    scale = torch.tensor([0.0, 1.25]) if residual else None
    with use_backend(backend):
        y = mbconv(
            x.contiguous(memory_format=memory_format), *stages, stride=stride, scale=scale, residual=residual
        )  # fmt: skip
        grad = torch.randn(y.shape, generator=numbers).to(dtype)
        # A mean near zero is as exact as the deviation allows.
        return [y, *torch.autograd.grad(y, leaves, grad), *map(torch.stack, running)]


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name):
    dtype, *rest = BLOCKS[name]

    def run(seed):
        """Triples of got, eager and exact."""
        given = dtype, seed
        return list(
            zip(
                block("triton", dtype, given, *rest),
                block("eager", dtype, given, *rest),
                block("eager", f64, given, *rest),
                strict=True,
            )
        )

    first = run(0)
    try:
        for triple in first:
            assert_close_to_reference(*triple)
    except AssertionError:
        # Of few values one may happen to cancel: closeness is judged over several seeds.
        runs = [first, *map(run, range(1, SEEDS))]
        for same in zip(*runs, strict=True):
            assert_close_to_reference(*map(torch.stack, zip(*same, strict=True)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_mbconv(layout):
    module = FusedMBConv(8, 8, expand_ratio=2, se_ratio=0.25)
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=layout).requires_grad_()
    results = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            y = module(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
