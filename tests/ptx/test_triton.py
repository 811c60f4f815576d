"""The Triton kernels as compiled for a GPU, executed on the CPU by ptxrun, which also finds races and bad accesses."""

import os
import re
import sys

import phases
import pytest
import torch
from phases import feature_map, norm

from effkernels.ops._activation import Activation
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv.op import NO_NORM

FOLDER = os.environ.get("EFFKERNELS_PTXRUN")
if not FOLDER:
    pytest.skip("EFFKERNELS_PTXRUN does not name the folder that holds ptxrun/", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, FOLDER)
import ptxrun  # noqa: E402

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
SILU, HARDSWISH = Activation.SILU, Activation.HARDSWISH

# Lanes that hold copies of a sum all store it, as Triton compiles reductions. That they store the same bits is seen in
# the results, which would otherwise depend on the order of lanes.
REDUNDANT_STORE = re.compile(r"at PTX line (\d+): .*; write after write by thread \d+ at line \1:", re.DOTALL)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def gpu(request):
    with ptxrun.triton_fixture(request.param, race=True) as driver:
        yield driver


def check(gpu, function, *args, launches):
    """`function` gives right results, the same ones in every order of blocks, warps and lanes."""
    expected = None
    for order in ("fwd", "rev", "rand"):
        gpu.options["order"] = order
        before = len(gpu.results)
        got = function("triton", *args)
        results = gpu.results[before:]
        assert len(results) == launches
        for result in results:
            assert not result.errors and not result.unsupported
            assert [w for w in result.warnings if not REDUNDANT_STORE.search(w)] == []
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        expected = got


# dtype, layout, [N, C, H, W], k, stride, padding, prologue and epilogue, reduce, launches
CONVOLUTIONS = {
    "inference": (f16, "channels_last", (2, 96, 13, 15), 3, 2, "same", (None, SILU), Reduce.MEAN, 1),
    "inference in rows": (f16, "nchw", (2, 17, 13, 15), 5, 1, "auto", (None, SILU), Reduce.MEAN, 1),
    "training": (bf16, "channels_last", (3, 48, 13, 15), 5, 1, "auto", (SILU, None), Reduce.STATISTICS, 2),
    "training in rows": (f32, "nchw", (3, 17, 13, 15), 3, 1, "auto", (SILU, None), Reduce.STATISTICS, 2),
    "k 7": (f32, "channels_last", (1, 129, 7, 7), 7, 1, "auto", (None, HARDSWISH), Reduce.MEAN, 1),
    "k 7, stride 2 in rows": (f16, "nchw", (1, 3, 13, 150), 7, 2, "same", (SILU, SILU), Reduce.STATISTICS, 2),
    "odd channels": (f16, "channels_last", (1, 17, 9, 11), 3, 1, 0, (None, None), Reduce.NONE, 1),
    "one pixel": (f32, "nchw", (3, 129, 1, 1), 3, 1, "auto", (None, SILU), Reduce.MEAN, 1),
    "one channel": (f32, "channels_last", (2, 1, 7, 1), 5, 2, "same", (None, None), Reduce.STATISTICS, 2),
    "slice": (f16, "sliced channels_last", (2, 17, 9, 11), 5, 2, "auto", (None, SILU), Reduce.NONE, 1),
    "slice in rows": (bf16, "sliced nchw", (2, 3, 9, 11), 3, 2, 2, (None, SILU), Reduce.NONE, 1),
    "empty batch": (f16, "nchw", (0, 3, 9, 11), 3, 1, "auto", (None, SILU), Reduce.MEAN, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_dwconv(gpu, case):
    dtype, layout, shape, k, stride, padding, acts, reduce, launches = CONVOLUTIONS[case]
    x, weight = feature_map(shape, dtype, layout), torch.randn(shape[1], 1, k, k).to(dtype)
    norms = [NO_NORM if act is None else norm(shape[1], act, dtype) for act in acts]
    check(gpu, phases.check_dwconv, x, weight, *norms, stride, padding, reduce, launches=launches)


MAPS = {
    "channels in lanes": (f16, "channels_last", (2, 144, 13, 15)),
    "rows in lanes": (f16, "nchw", (2, 16, 16, 16)),
    "rows of odd length": (bf16, "nchw", (2, 17, 7, 7)),
    "odd channels": (f32, "channels_last", (2, 17, 7, 7)),
    "one pixel": (f32, "nchw", (3, 129, 1, 1)),
    "slice": (f16, "sliced nchw", (2, 3, 9, 11)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MAPS)
def test_passes_over_a_map(gpu, case):
    dtype, layout, shape = MAPS[case]
    x, batch_norm = feature_map(shape, dtype, layout), norm(shape[1], SILU, dtype)
    check(gpu, phases.check_bn_statistics, x, launches=2)
    check(gpu, phases.check_bn_apply, x, batch_norm, Reduce.MEAN, launches=1)
    check(gpu, phases.check_bn_apply, x, batch_norm, Reduce.NONE, launches=1)
    check(gpu, phases.check_spatial_mean, x, launches=1)
    check(gpu, phases.check_channel_scale, x, torch.rand(shape[:2]), launches=1)


@pytest.mark.parametrize("act", list(Activation))
def test_activations(gpu, act):
    x = torch.tensor([-float("inf"), -1e4, -90, -3.5, -3, -1, 0, 1, 3, 3.5, 6, 7, 90, float("inf"), float("nan")])
    x = x.repeat(2, 1).view(2, 1, 1, -1)
    vectors = torch.zeros(1), torch.ones(1), None, None
    check(gpu, phases.check_bn_apply, x, (*vectors, 0.0, act), Reduce.NONE, launches=1)


@pytest.mark.parametrize("dtype", [f32, f16])
@pytest.mark.parametrize("batch, channels, reduced", [(3, 17, 1), (2, 300, 129)])
def test_se_gate(gpu, batch, channels, reduced, dtype):
    w1, w2 = torch.randn(reduced, channels) / channels**0.5, torch.randn(channels, reduced) / reduced**0.5
    weights = [w1.to(dtype), None, w2.to(dtype), torch.randn(channels).to(dtype)]
    check(gpu, phases.check_se_gate, torch.randn(batch, channels), weights, SILU, Activation.SIGMOID, launches=2)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_statistics_of_a_mean_far_from_zero(gpu, layout):
    x = feature_map((3, 5, 13, 15), f32, layout).add_(1000)
    check(gpu, phases.check_bn_statistics, x, launches=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_every_value_is_loaded_in_full_sectors(layout):
    x, weight = feature_map((4, 96, 28, 28), f16, layout), torch.randn(96, 1, 3, 3).half()
    with ptxrun.triton_fixture(80, profile=True) as driver:
        phases.check_dwconv("triton", x, weight, NO_NORM, norm(96, SILU), 1, "auto", Reduce.NONE)
        phases.check_bn_apply("triton", x, norm(96, SILU), Reduce.NONE)
    conv, apply = (r.profile for r in driver.results)
    for profile in (conv, apply):
        # The smallest number of sectors that hold x and y: nothing else is touched.
        assert 32 * profile.buffer("x_ptr").unique_loaded == x.nbytes
        assert 32 * profile.buffer("y_ptr").unique_stored == x.nbytes
    assert apply.buffer("x_ptr").load_efficiency == apply.buffer("y_ptr").store_efficiency == 1
    assert conv.buffer("x_ptr").load_efficiency >= (1 if layout == "channels_last" else 0.65)
    # What a block reads again is rows above its band and columns beside its tile.
    assert conv.buffer("x_ptr").block_sectors * 32 <= 1.8 * x.nbytes
