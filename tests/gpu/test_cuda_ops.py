"""The GPU backends on a GPU: through the dispatcher, their launchers and streams."""

import pytest
import tiles
import torch
from hypothesis import given, settings
from strategies import drawn_cases

import effkernels
from effkernels import _build, _native, ops
from effkernels.nn import tuning
from effkernels.ops import _tiles
from effkernels.ops._cases import Norm, cases_for
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv.op import DWCONV, NO_NORM

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(
    _native.MISSING["cuda"] is not None, reason=f"the CUDA library: {_native.MISSING['cuda']}"
)


@needs_cuda
@pytest.mark.parametrize("case", cases_for("cuda"), ids=str)
def test_cuda(case):
    case.check("cuda", "cuda")


@pytest.mark.skipif(_native.MISSING["triton"] is not None, reason=f"triton: {_native.MISSING['triton']}")
@pytest.mark.parametrize("case", cases_for("triton", "core"), ids=str)
def test_triton(case):
    case.check("triton", "cuda")


@needs_cuda
@settings(max_examples=300)
@given(drawn_cases("cuda"))
def test_drawn_case(case):
    case.check("cuda", "cuda")


@pytest.fixture
def on_gpu():
    with torch.device("cuda"):
        yield


@needs_cuda
@pytest.mark.parametrize("change, message", [({"stride": 3}, "stride"), ({"weight": torch.ones(4, 1, 3, 3)}, "weight")])
def test_bad_arguments(on_gpu, change, message):
    arguments = {"x": torch.ones(1, 8, 6, 6), "weight": torch.ones(8, 1, 3, 3), "stride": 1} | change
    x, weight, stride = (arguments[name] for name in ("x", "weight", "stride"))
    with pytest.raises(ValueError, match=message):
        DWCONV("cuda", x, weight.cuda(), *NO_NORM, *NO_NORM, stride, 1, 1, 6, 6, Reduce.NONE)


@needs_cuda
def test_dwconv_beyond_2_31_elements(on_gpu):
    # Offsets of the last images do not fit 32 bits.
    shape = (2049, 64, 128, 128)
    if torch.cuda.get_device_properties(0).total_memory < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    x, weight = torch.ones(shape, dtype=torch.float16), torch.ones(64, 1, 3, 3, dtype=torch.float16)
    y, sums = DWCONV("cuda", x, weight, *NO_NORM, *NO_NORM, 1, 1, 1, 128, 128, Reduce.MEAN)
    assert torch.equal(y[-1], y[0])
    assert torch.equal(sums[-1], sums[0])
    assert y[-1, -1, 64, 64] == 9


@needs_cuda
def test_graph_capture_and_streams(on_gpu):
    x, weight = torch.randn(2, 16, 20, 20).half(), torch.randn(16, 1, 3, 3).half()
    vectors = Norm().make(16, torch.float16)[:4]
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


@needs_cuda
@pytest.mark.parametrize("case", tiles.CASES, ids=str)
def test_every_tile(case):
    with _tiles.recorded() as launches:
        case.check("cuda", "cuda")
    for tile in launches[0].tiles:
        tiles.check(case, tile, "cuda")


@pytest.fixture
def no_tiles(monkeypatch, tmp_path):
    """None known to this process, or kept by another."""
    monkeypatch.setattr(_build, "CACHE", tmp_path)
    yield
    for name in [*_tiles.asked_for]:
        _tiles.ask(name, (), "")


@needs_cuda
def test_autotune(no_tiles, monkeypatch):
    blocks = [effkernels.MBConv(16, 24, stride=2), effkernels.MBConv(24, 24, kernel_size=5), effkernels.MBConv(24, 24)]
    model = torch.nn.Sequential(*blocks).cuda().half().eval()
    x = torch.randn(8, 16, 56, 56, device="cuda").half().contiguous(memory_format=torch.channels_last)
    with effkernels.use_backend("cuda"), torch.no_grad():
        before = model(x)
        found = effkernels.autotune(model, x)
        assert {_tiles.op_of(problem) for problem in found} == {"expand_dwconv", "pointwise_inference"}
        torch.testing.assert_close(model(x), before)
        graph = effkernels.graph(model, x)
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
        for problem in found:
            _tiles.ask(problem, (), "")
        monkeypatch.setattr(tuning, "_times", lambda runs: pytest.fail("timed once more"))
        assert effkernels.autotune(model, x) == found
        with pytest.raises(RuntimeError, match="being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            effkernels.autotune(model, x)
