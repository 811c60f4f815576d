"""The CUDA backend on a GPU: through the dispatcher, its launchers and streams."""

import itertools

import phases
import pytest
import torch
from phases import feature_map, norm

import effkernels
from effkernels import _native, ops
from effkernels.ops._activation import Activation
from effkernels.ops.batch_norm.op import BN_STATISTICS, Reduce
from effkernels.ops.dwconv.op import DWCONV, NO_NORM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.MISSING["cuda"] is not None, reason=f"the CUDA library: {_native.MISSING['cuda']}"),
]
LAYOUTS = ("nchw", "channels_last", "sliced nchw", "sliced channels_last")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SILU, SIGMOID = Activation.SILU, Activation.SIGMOID


@pytest.fixture(autouse=True)
def on_gpu():
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, stride, layout", [*itertools.product((3, 5, 7), (1, 2), LAYOUTS)])
def test_dwconv(k, stride, layout, dtype):
    # Every instance, and what selects it.
    for shape, reduce in (((2, 24, 30, 33), Reduce.MEAN), ((3, 17, 13, 15), Reduce.STATISTICS), ((1, 3, 1, 1), 0)):
        x, weight = feature_map(shape, dtype, layout), torch.randn(shape[1], 1, k, k).to(dtype)
        vectors = norm(shape[1], SILU)
        phases.check_dwconv("cuda", x, weight, vectors, vectors, stride, "same", reduce)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_phases(layout, dtype):
    for shape in ((2, 24, 56, 56), (3, 17, 7, 7), (1, 600, 3, 2)):
        x = feature_map(shape, dtype, layout)
        phases.check_bn_statistics("cuda", x)
        phases.check_bn_apply("cuda", x, norm(shape[1], SILU), Reduce.MEAN)
        phases.check_spatial_mean("cuda", x)
        phases.check_channel_scale("cuda", x, torch.rand(shape[:2]))
        r = max(shape[1] // 4, 1)
        weights = [torch.randn(s).to(dtype) for s in ((r, shape[1]), (r,), (shape[1], r), (shape[1],))]
        phases.check_se_gate("cuda", torch.randn(shape[:2]), weights, SILU, SIGMOID)


def test_empty_batch():
    x, weight = torch.empty(0, 8, 6, 6), torch.randn(8, 1, 3, 3)
    y, sums = DWCONV("cuda", x, weight, *NO_NORM, *NO_NORM, 2, 1, 1, 3, 3, Reduce.MEAN)
    assert y.shape == (0, 8, 3, 3)
    assert sums.shape == (0, 8)
    assert BN_STATISTICS("cuda", x).isnan().all()


@pytest.mark.parametrize("change, message", [({"stride": 3}, "stride"), ({"weight": torch.ones(4, 1, 3, 3)}, "weight")])
def test_bad_arguments(change, message):
    arguments = {"x": torch.ones(1, 8, 6, 6), "weight": torch.ones(8, 1, 3, 3), "stride": 1} | change
    x, weight, stride = (arguments[name] for name in ("x", "weight", "stride"))
    with pytest.raises(ValueError, match=message):
        DWCONV("cuda", x, weight.cuda(), *NO_NORM, *NO_NORM, stride, 1, 1, 6, 6, Reduce.NONE)


def test_dwconv_beyond_2_31_elements():
    # Offsets of the last images do not fit 32 bits.
    shape = (2049, 64, 128, 128)
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    x, weight = torch.ones(shape, dtype=torch.float16), torch.ones(64, 1, 3, 3, dtype=torch.float16)
    y, sums = DWCONV("cuda", x, weight, *NO_NORM, *NO_NORM, 1, 1, 1, 128, 128, Reduce.MEAN)
    assert torch.equal(y[-1], y[0])
    assert torch.equal(sums[-1], sums[0])
    assert y[-1, -1, 64, 64] == 9


def test_graph_capture_and_streams():
    x, weight = feature_map((2, 16, 20, 20), torch.float16), torch.randn(16, 1, 3, 3).half()
    vectors = [t.cuda() for t in norm(16)[:4]]
    reduce_weight, expand_weight = torch.randn(4, 16).half(), torch.randn(16, 4).half()

    def block():
        mean, var, gamma, beta = vectors
        y, pooled = ops.dwconv_bn_swish(x, weight, gamma, beta, mean, var, return_pooled=True)
        return ops.squeeze_excite(y, reduce_weight, None, expand_weight, None, pooled=pooled)

    with effkernels.use_backend("cuda"), torch.no_grad():
        expected = block()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            on_side = block()
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(on_side, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
