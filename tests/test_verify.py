"""Trust in kernels: checked at the first use, kept in the cache, set aside where one is wrong.

The C++ kernels stand in for a GPU's: `auto` is told to take them only where `verify` found them right.
"""

import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from typer.testing import CliRunner

import effkernels
from effkernels import _build, _native, backends, ops, verify
from effkernels.cli import app
from effkernels.ops import _cases
from effkernels.ops._cases import cases_for
from effkernels.ops.dwconv.op import DWCONV

pytestmark = pytest.mark.skipif(_native.MISSING["cpp"] is not None, reason="the C++ kernels are not built")

X, WEIGHT = torch.randn(2, 5, 9, 8), torch.randn(5, 1, 3, 3)
STATISTICS = torch.zeros(5), torch.ones(5)


def run(backend="auto"):
    """Which backend a call took, and its result."""
    with effkernels.use_backend(backend), backends.record_decisions() as decisions:
        y = ops.dwconv_bn_swish(X, WEIGHT, None, None, *STATISTICS)
    return decisions[0], y


@pytest.fixture(autouse=True)
def unproven(monkeypatch, tmp_path):
    """A device that no kernel has run on, and an empty cache."""
    monkeypatch.setattr(backends, "VERIFIED", ("cpp", "cuda", "triton"))
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(_build, "CACHE", tmp_path)
    new_process(monkeypatch)


def new_process(monkeypatch):
    monkeypatch.setattr(verify, "_verdicts", {})
    monkeypatch.setattr(verify, "_warned", set())


@pytest.fixture
def wrong_kernel(monkeypatch):
    right = DWCONV.overloads["cpp"]

    def wrong(*args):
        y, sums = right(*args)
        if y.dtype == torch.float16 and y.numel():
            y[-1, -1, -1, -1] += 1
        return y, sums

    monkeypatch.setitem(DWCONV.overloads, "cpp", wrong)


def no_check(*args):
    raise AssertionError("the kernels were checked once more")


def test_right_kernels_are_taken_and_checked_once(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run()[0].backend == "cpp"
        monkeypatch.setattr(verify, "_first_use", no_check)
        assert run()[0].backend == "cpp"
        new_process(monkeypatch)
        assert run()[0].backend == "cpp"
    assert {"dwconv", "bn_apply", "bn_statistics", "se_gate"} <= verify.load("cpp", "cpu").cases.keys()


@pytest.mark.parametrize("change", ["device_name", "version"])
def test_another_device_or_version_is_checked_anew(monkeypatch, change):
    run()
    new_process(monkeypatch)
    monkeypatch.setattr(verify, change, lambda *_: "another")
    monkeypatch.setattr(verify, "_first_use", no_check)
    with pytest.raises(AssertionError, match="checked once more"):
        run()


def test_a_wrong_kernel_is_named_and_set_aside(monkeypatch, wrong_kernel):
    with pytest.warns(UserWarning) as caught:
        decision, y = run()
        run()
    (warning,) = [str(w.message) for w in caught if "without its cpp kernels" in str(w.message)]
    assert "set aside: dwconv float16" in warning
    assert decision.backend == "eager"
    assert not backends.takes(DWCONV.kernels, X)
    torch.testing.assert_close(y, run("eager")[1], rtol=0, atol=0)
    explanation = str(effkernels.explain(ops.bn_act, X, None, None, *STATISTICS))
    assert "not cpp: set aside: dwconv float16" in explanation
    assert "relative L2 error" in explanation

    assert run("cpp")[0].backend == "cpp"  # one asked for by name is obeyed
    new_process(monkeypatch)
    monkeypatch.setattr(verify, "_first_use", no_check)
    with pytest.warns(UserWarning, match="set aside: dwconv"):
        assert run()[0].backend == "eager"


def test_a_kernel_that_fails_is_set_aside(monkeypatch):
    def failing(*args):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setitem(DWCONV.overloads, "cpp", failing)
    with pytest.warns(UserWarning, match="set aside: an illegal memory access"):
        assert run()[0].backend == "eager"


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(verify, "is_capturing", lambda: True)
    with pytest.warns(UserWarning, match="not checked on this device yet: run `effkernels doctor --verify`"):
        assert run()[0].backend == "eager"
    assert verify.load("cpp", "cpu") is None


def test_nothing_is_checked_while_a_compiler_traces(monkeypatch):
    def function(x):
        return ops.dwconv_bn_swish(x, WEIGHT, None, None, *STATISTICS)

    def called(graph):
        return {str(node.target) for node in graph.graph.nodes if "effkernels" in str(node.target)}

    graphs = []

    def backend(graph, inputs):
        graphs.append(called(graph))
        return graph

    with effkernels.use_backend("auto"):
        with pytest.warns(UserWarning, match="not checked on this device yet"):
            torch.compile(function, backend=backend, fullgraph=True)(X)
        verify._first_use("cpp", "cpu")
        new_process(monkeypatch)
        torch._dynamo.reset()
        torch.compile(function, backend=backend, fullgraph=True)(X)
    assert graphs[0] == set()
    assert graphs[1] == {"effkernels.dwconv.cpp"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(_native.MISSING["triton"] is not None, reason="triton is not installed")
def test_fake_tensors_of_a_gpu_that_is_not_there():
    with FakeTensorMode(), pytest.warns(UserWarning, match="runs unfused on cuda"):
        decision = backends.choose("bn_act", torch.empty(1, 2, 3, 4, device="cuda"))
    assert decision == "eager"
    assert "no GPU" in verify.why_not("triton", "cuda:0", False)


def test_the_check_ignores_the_modes_of_its_caller():
    with torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
        verdict = verify._first_use("cpp", "cpu")
    assert verdict.wrong == {}


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(_build, "CACHE", tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot keep the verdict"):
        assert run()[0].backend == "cpp"


@pytest.fixture
def few_cases(monkeypatch):
    monkeypatch.setattr(_cases, "cases_for", lambda *_: cases_for("cpp", "core")[::3])


def doctor():
    return CliRunner().invoke(app, ["doctor", "--verify"], env={"COLUMNS": "300"})


def test_doctor_verifies_and_auto_believes_it(monkeypatch, few_cases):
    result = doctor()
    assert result.exit_code == 0, result.output
    assert "dwconv" in result.output
    monkeypatch.setattr(verify, "_first_use", no_check)
    assert run()[0].backend == "cpp"


def test_doctor_names_a_wrong_kernel(wrong_kernel, few_cases):
    result = doctor()
    assert result.exit_code == 1
    assert "dwconv float16" in result.output
    with pytest.warns(UserWarning, match="set aside: dwconv float16"):
        assert run()[0].backend == "eager"
