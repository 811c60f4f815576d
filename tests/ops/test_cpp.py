"""The C++ CPU kernels: every phase op, on every instruction set that this machine has."""

import os
import subprocess
import sys

import phases
import pytest
import torch
import torch.nn.functional as F
from phases import feature_map, norm

from effkernels import _native
from effkernels.ops._activation import Activation
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv.op import DWCONV, NO_NORM
from effkernels.ops.squeeze_excite.op import CHANNEL_SCALE, SE_GATE, SPATIAL_MEAN

pytestmark = pytest.mark.skipif(_native.MISSING["cpp"] is not None, reason=f"cpp: {_native.MISSING['cpp']}")

LAYOUTS = ("nchw", "channels_last", "sliced nchw", "sliced channels_last")
SILU, RELU6, HARDSWISH = Activation.SILU, Activation.RELU6, Activation.HARDSWISH
f32 = torch.float32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("channels", [1, 2, 3, 17, 32, 129])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (13, 15), (40, 33)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dwconv_sizes(layout, size, channels):
    for k, stride, padding in ((3, 1, "auto"), (3, 2, "same"), (5, 2, "auto"), (7, 1, "same")):
        x, weight = feature_map((2, channels, *size), f32, layout), torch.randn(channels, 1, k, k)
        phases.check_dwconv("cpp", x, weight, NO_NORM, NO_NORM, stride, padding, Reduce.MEAN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5, 7])
def test_dwconv_between_norms(k, stride, layout, dtype):
    # Padding is zero after the prologue, whose value at zero is not.
    x, weight = feature_map((3, 19, 14, 23), dtype, layout), torch.randn(19, 1, k, k).to(dtype)
    norms = norm(19, SILU, dtype), norm(19, HARDSWISH, dtype)
    for padding, reduce in (("auto", Reduce.STATISTICS), ("same", Reduce.MEAN)):
        phases.check_dwconv("cpp", x, weight, *norms, stride, padding, reduce)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64(layout):
    """There is nothing more exact to hold float64 against: it agrees with PyTorch to rounding."""
    x, weight = feature_map((3, 19, 14, 23), torch.float64, layout), torch.randn(19, 1, 5, 5, dtype=torch.float64)
    first, second = norm(19, SILU, torch.float64), norm(19, HARDSWISH, torch.float64)
    y, stats = DWCONV("cpp", x, weight, *first, *second, 2, 2, 2, 7, 12, Reduce.STATISTICS)
    d = F.conv2d(phases.norm_act(x, first), weight, None, 2, 2, groups=19)
    exact = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, phases.norm_act(d, second), **exact)
    torch.testing.assert_close(stats, torch.stack([y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)]), **exact)
    weights = [torch.randn(s, dtype=torch.float64) for s in ((5, 19), (5,), (19, 5), (19,))]
    pooled = SPATIAL_MEAN("cpp", x)
    torch.testing.assert_close(pooled, x.mean((2, 3)), **exact)
    gate = SE_GATE("cpp", pooled, *weights, SILU, Activation.SIGMOID)
    expected = torch.sigmoid(F.linear(F.silu(F.linear(pooled, *weights[:2])), *weights[2:]))
    torch.testing.assert_close(gate, expected, **exact)
    torch.testing.assert_close(CHANNEL_SCALE("cpp", x, gate), x * gate[:, :, None, None], **exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_dwconv_padding(padding, layout):
    """No padding, less than the window's, and more than the window."""
    for stride in (1, 2):
        x, weight = feature_map((1, 18, 6, 9), f32, layout), torch.randn(18, 1, 3, 3)
        phases.check_dwconv("cpp", x, weight, NO_NORM, norm(18, SILU), stride, padding, Reduce.STATISTICS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dwconv_in_bands_and_chunks(layout):
    """Maps large enough to be cut along rows and channels."""
    x, weight = feature_map((1, 70, 61, 150), f32, layout), torch.randn(70, 1, 5, 5)
    for stride in (1, 2):
        phases.check_dwconv("cpp", x, weight, norm(70, SILU), norm(70, RELU6), stride, "auto", Reduce.STATISTICS)


def test_dwconv_reads_any_strides():
    x = torch.randn(2, 9, 11, 4, 3).permute(0, 3, 1, 2, 4)[..., 1]  # no stride is 1
    weight = torch.randn(3, 3, 4, 1).permute(2, 3, 1, 0)
    phases.check_dwconv("cpp", x, weight, norm(4, SILU), NO_NORM, 1, "auto", Reduce.MEAN)
    phases.check_bn_apply("cpp", x, norm(4, SILU), Reduce.MEAN)
    phases.check_bn_statistics("cpp", x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_inf_pass(layout):
    x = feature_map((1, 18, 6, 7), f32, layout)
    x[0, 0, 2, 3], x[0, 1, 4, 5], x[0, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
    epilogue = norm(18, Activation.RELU)
    y, _ = phases.check_dwconv("cpp", x, torch.randn(18, 1, 3, 3), NO_NORM, epilogue, 1, "auto", Reduce.NONE)
    assert y[0, 0].isnan().sum() == 9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_mean_far_from_zero(layout):
    x = feature_map((3, 20, 13, 15), f32, layout).add_(1000)
    centre = F.pad(torch.ones(20, 1, 1, 1), (1, 1, 1, 1))
    stats = phases.check_bn_statistics("cpp", x)
    y, sums = DWCONV("cpp", x, centre, *NO_NORM, *NO_NORM, 1, 1, 1, 13, 15, Reduce.STATISTICS)
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    phases.check_statistics(sums, x)
    torch.testing.assert_close(sums[1], stats[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 129, 1, 1), (9, 2, 1, 7), (9, 3, 7, 1), (2, 1, 13, 15), (2, 35, 40, 150)])
def test_passes_over_a_map(shape, layout, dtype):
    x = feature_map(shape, dtype, layout)
    phases.check_bn_statistics("cpp", x)
    phases.check_bn_apply("cpp", x, norm(shape[1], SILU, dtype), Reduce.MEAN)
    phases.check_spatial_mean("cpp", x)
    phases.check_channel_scale("cpp", x, torch.rand(shape[:2], dtype=torch.promote_types(dtype, f32)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", list(Activation))
def test_activations(act, dtype):
    x = torch.tensor([-1e4, -90, -3.5, -3, -1, -0.0, 0, 1, 3, 3.5, 6, 7, 90, float("inf"), float("nan")])
    x = x.repeat(2, 1).view(2, 1, 1, -1).to(dtype)
    identity = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype), None, None, 0.0
    phases.check_bn_apply("cpp", x, (*identity, act), Reduce.NONE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_16_bits(dtype):
    """Every 16-bit value survives, and values between two of them go to the nearest even, as PyTorch rounds."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, 1, -1)
    ones = torch.ones(1, 1, dtype=f32)
    torch.testing.assert_close(
        torch.ops.effkernels.channel_scale.cpp(every, ones), every, rtol=0, atol=0, equal_nan=True
    )
    factor = torch.full((1, 1), 1 + 2.0**-9)
    expected = (every.float() * factor.view(1, 1, 1, 1)).to(dtype)
    torch.testing.assert_close(
        torch.ops.effkernels.channel_scale.cpp(every, factor), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("batch, channels, reduced", [(0, 3, 1), (1, 1, 1), (3, 17, 5), (2, 300, 129)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_se_gate(dtype, batch, channels, reduced):
    w1, w2 = torch.randn(reduced, channels) / channels**0.5, torch.randn(channels, reduced) / reduced**0.5
    weights = [w1.to(dtype), torch.randn(reduced).to(dtype), w2.to(dtype), None]
    pooled = torch.randn(batch, channels, dtype=torch.promote_types(dtype, f32))
    phases.check_se_gate("cpp", pooled, weights, SILU, Activation.SIGMOID)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(layout):
    x = feature_map((0, 5, 6, 7), f32, layout)
    y, mean = DWCONV("cpp", x, torch.randn(5, 1, 3, 3), *NO_NORM, *NO_NORM, 1, 1, 1, 6, 7, Reduce.MEAN)
    assert y.shape == (0, 5, 6, 7) and mean.shape == (0, 5)


def test_same_bits_every_time_and_with_every_thread_count():
    x, weight = feature_map((3, 40, 33, 35)), torch.randn(40, 1, 5, 5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4, 4):
            torch.set_num_threads(count)
            for layout in (torch.contiguous_format, torch.channels_last):
                arguments = (x.contiguous(memory_format=layout), weight, *NO_NORM, *norm_of_zero(40))
                results.append(DWCONV("cpp", *arguments, 1, 2, 2, 33, 35, Reduce.STATISTICS))
    finally:
        torch.set_num_threads(threads)
    for first, other in zip(results[:2] * 3, results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def norm_of_zero(channels):
    return torch.zeros(channels), torch.ones(channels), None, None, 1e-5, SILU


@pytest.mark.skipif(_native.introspection is None, reason="needs the introspection module")
def test_every_instruction_set():
    """The same tests on the lesser instruction sets, which are chosen when a process starts."""
    if "EFFKERNELS_CPU_ISA" in os.environ:
        pytest.skip("this is the inner run")
    lesser = {"avx512": ["avx2", "baseline"], "avx2": ["baseline"], "baseline": []}
    for isa in lesser[_native.introspection.cpu_isa()]:
        inner = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        result = subprocess.run(
            inner, env={**os.environ, "EFFKERNELS_CPU_ISA": isa}, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{isa}:\n{result.stdout[-4000:]}"
        assert " passed" in result.stdout
