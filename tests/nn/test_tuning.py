"""effkernels.autotune, and the tiles that are set by hand: what is chosen, kept and told.

Launches are planned as on a GPU and not executed; tests/ptx and tests/cuda_on_cpu execute kernels with other tiles.
"""

import json

import pytest
import torch
from cuda_on_cpu import library
from ptx import emulated_cuda

import effkernels
from effkernels import MBConv, _build, _native, backends, verify
from effkernels.nn import tuning
from effkernels.ops import _tiles, use_tile
from effkernels.profiling import Workload, record

X = torch.zeros(1, 16, 28, 28).half().contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def launchers():
    if reason := library.why_not():
        pytest.skip(reason)
    with emulated_cuda.installed(lambda *_: None):
        yield


@pytest.fixture
def on_cpu(monkeypatch, tmp_path, launchers):
    """The CUDA launchers take CPU tensors; no tile is known."""
    monkeypatch.setitem(backends.DEVICES, "cuda", ("cpu",))
    monkeypatch.setitem(_native.MISSING, "cuda", None)
    monkeypatch.setattr(_build, "CACHE", tmp_path)
    with effkernels.use_backend("cuda"):
        yield
    new_process()


def new_process():
    for name in [*_tiles.asked_for]:
        _tiles.ask(name, (), "")


@pytest.fixture
def timed(monkeypatch):
    """The stopwatch says that the third contender is the fastest; the tile that each run took is noted."""
    seen = []

    def times(runs):
        seen.append([])
        for run in runs:
            with _tiles.recorded() as launches:
                run()
            seen[-1].append([launch.tile for launch in launches])
        return [abs(i - 2) + 1.0 for i in range(len(runs))]

    monkeypatch.setattr(tuning, "_times", times)
    return seen


def model():
    return torch.nn.Sequential(MBConv(16, 16), MBConv(16, 16)).half().eval()


def launched(function=None):
    with torch.no_grad(), _tiles.recorded() as launches:
        (function or model())(X)
    return launches


def test_the_fastest_of_the_cheapest_is_taken(on_cpu, timed):
    before = launched(MBConv(16, 16).half().eval())
    assert [launch.op for launch in before] == ["expand_dwconv", "pointwise_inference"]
    assert all(launch.tile == launch.tiles[0] and launch.by == "" for launch in before)
    found = effkernels.autotune(model(), X)
    assert found == {launch.problem: launch.tiles[2] for launch in before}
    # Of two equal blocks each launch is timed once, and only its own tile differs.
    first, second = ([launch.tiles[0]] * 5 for launch in before)
    contenders = [list(launch.tiles[:5]) for launch in before]
    assert len(timed) == 2
    assert [list(c) for c in zip(*timed[0], strict=True)] == [contenders[0], second]
    tuned_first = [before[0].tiles[2]] * len(contenders[1])
    assert [list(c) for c in zip(*timed[1], strict=True)] == [tuned_first, contenders[1]]
    assert first != contenders[0]
    assert [launch.tile for launch in launched()] == [launch.tiles[2] for launch in before] * 2


def test_explain_tells(on_cpu, timed):
    assert all(d.remark == "" for d in effkernels.explain(model(), X).decisions)
    tuned = effkernels.autotune(model(), X)
    (group, strips, width), (pixels, channels) = tuned.values()
    told = (
        f"expand_dwconv: group {group}, strips {strips}, width {width} by autotune; "
        f"pointwise_inference: pixels {pixels}, channels {channels} by autotune"
    )
    with torch.no_grad():
        explanation = effkernels.explain(model(), X)
        assert [d.remark for d in explanation.decisions if d.op == "mbconv_inference"] == [told] * 2
        assert told in str(explanation)
        with use_tile("expand_dwconv", group=16, strips=1, width=7):
            assert "expand_dwconv: group 16, strips 1, width 7 by use_tile; point" in str(
                effkernels.explain(model(), X)
            )


def no_times(runs):
    raise AssertionError("timed once more")


def test_the_next_process_times_nothing(on_cpu, timed, monkeypatch):
    found = effkernels.autotune(model(), X)
    monkeypatch.setattr(tuning, "_times", no_times)
    assert effkernels.autotune(model(), X) == found
    new_process()
    assert launched()[0].tile != found[launched()[0].problem]
    assert effkernels.autotune(model(), X) == found
    assert launched()[0].tile == found[launched()[0].problem]


def test_what_is_known_of_other_problems_stays(on_cpu, timed, monkeypatch, tmp_path):
    found = effkernels.autotune(model(), X)
    new_process()
    found |= effkernels.autotune(model(), X[:, :, 1:])
    (file,) = (tmp_path / "tiles").iterdir()
    assert json.loads(file.read_text()) == {problem: [*tile] for problem, tile in found.items()}
    assert len(found) == 4


@pytest.mark.parametrize("change", ["device_name", "version"])
def test_another_gpu_or_version_is_timed_anew(on_cpu, timed, monkeypatch, change):
    effkernels.autotune(model(), X)
    new_process()
    monkeypatch.setattr(verify, change, lambda *_: "another")
    effkernels.autotune(model(), X)
    assert len(timed) == 4


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "a tile that is no contender", "no tiles"])
def test_a_corrupt_cache_is_not_believed(on_cpu, timed, tmp_path, content):
    found = effkernels.autotune(model(), X)
    new_process()
    (file,) = (tmp_path / "tiles").iterdir()
    if content == "a tile that is no contender":
        content = json.dumps({problem: [16, 1, 1000] for problem in found})
    if content == "no tiles":
        content = json.dumps(dict.fromkeys(found, 7))
    file.write_text(content)
    assert effkernels.autotune(model(), X) == found
    assert len(timed) == 4
    new_process()
    assert effkernels.autotune(model(), X) == found
    assert len(timed) == 4


def test_a_cache_that_cannot_be_written_is_said(on_cpu, timed, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(_build, "CACHE", tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot keep the tiles that autotune found"):
        found = effkernels.autotune(model(), X)
    assert launched()[0].tile == found[launched()[0].problem]


def test_nothing_is_tuned_while_a_graph_is_captured(on_cpu, monkeypatch):
    monkeypatch.setattr(verify, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured; call it before"):
        effkernels.autotune(model(), X)


def test_nothing_is_tuned_beside_a_tile_that_is_held(on_cpu):
    with (
        use_tile("dwconv", group=8, strips=1, width=1),
        pytest.raises(RuntimeError, match="use_tile holds a tile of dwconv"),
    ):
        effkernels.autotune(model(), X)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((lambda x: x, X), "autotune: model must be an nn.Module, got function"),
        ((torch.nn.ReLU(), [1]), "autotune: example must be a torch.Tensor, got list"),
        ((torch.nn.ReLU().eval(), X), "autotune: example must be on a CUDA device, got cpu"),
    ],
)
def test_what_cannot_be_tuned(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        effkernels.autotune(*arguments)


def test_neither_in_training_nor_without_kernels(on_cpu, monkeypatch):
    with pytest.raises(ValueError, match=r"training mode; call eval\(\) first"):
        effkernels.autotune(model().train(), X)
    monkeypatch.setitem(_native.MISSING, "cuda", "no nvcc")
    with pytest.raises(RuntimeError, match="there are no CUDA kernels: no nvcc"):
        effkernels.autotune(model(), X)


def test_other_kernels_have_nothing_to_tune(on_cpu):
    with effkernels.use_backend("eager"):
        assert effkernels.autotune(model(), X) == {}


def test_a_tile_set_by_hand_comes_first(on_cpu, timed):
    tuned = effkernels.autotune(model(), X)
    problem = launched()[0].problem
    for launches in ("expand_dwconv", problem):
        with use_tile(launches, group=16, strips=2, width=14):
            assert launched()[0].tile == (16, 2, 14)
            assert launched()[1].tile == [*tuned.values()][1]
            with use_tile(launches, group=32, strips=1, width=7):
                assert launched()[0].tile == (32, 1, 7)
            assert launched()[0].tile == (16, 2, 14)
        assert launched()[0].tile == tuned[problem]


def test_a_tile_of_one_problem_leaves_others_alone(on_cpu):
    with use_tile(launched()[0].problem, group=16, strips=2, width=14):
        assert launched()[0].tile == (16, 2, 14)
        with torch.no_grad(), _tiles.recorded() as launches:
            model()(X[:, :, 1:])
        assert launches[0].tile == launches[0].tiles[0]


def test_a_wide_block_is_expanded_inside_if_a_tile_is_set(on_cpu):
    x = torch.zeros(1, 160, 24, 24).half().contiguous(memory_format=torch.channels_last)
    wide = MBConv(160, 160, kernel_size=5).half().eval()

    def ops():
        with torch.no_grad(), _tiles.recorded() as launches:
            wide(x)
        counted = {launch.op for launch in record(Workload(wide, x, backend="cuda")).launches}
        assert counted >= {launch.op for launch in launches}
        return [launch.op for launch in launches]

    assert ops() == ["pointwise_inference", "dwconv", "pointwise_inference"]
    with use_tile("expand_dwconv", group=16, strips=1, width=6):
        assert ops() == ["expand_dwconv", "pointwise_inference"]


@pytest.mark.parametrize(
    "tile, message",
    [
        ((40, 1, 7), r"a group of 16, 32, 48, 64, strips of 1, 2, 3, 4 .*; got group 40, strips 1, width 7$"),
        ((16, 5, 1), "strips of 1, 2, 3, 4 .*; got group 16, strips 5, width 1$"),
        ((64, 4, 7), r"group / 4 \* strips \* width at most 256, .*; got group 64, strips 4, width 7$"),
        ((16, 1, 2**31 - 1), "at most 256"),
        ((16, 4, 16), r"in at most 101376 bytes of shared memory; got .*, which takes \d+ bytes$"),
    ],
)
def test_a_tile_that_does_not_fit_is_refused(on_cpu, tile, message):
    numbers = dict(zip(("group", "strips", "width"), tile, strict=True))
    block, x = MBConv(40, 40, stride=2).half().eval(), torch.zeros(1, 40, 56, 56).half()
    with (
        use_tile("expand_dwconv", **numbers),
        torch.no_grad(),
        pytest.raises(ValueError, match=f"expand_dwconv float16 1x40x56x56 .*: tile must have .*{message}"),
    ):
        block(x)


def test_other_ops_refuse_too(on_cpu):
    with (
        use_tile("pointwise_inference", pixels=64, channels=64),
        pytest.raises(ValueError, match="pixels x channels in 128 x 32, 128 x 64, 64 x 128; got 64 x 64"),
    ):
        launched()
    with (
        use_tile("dwconv", group=16, strips=1, width=5),
        pytest.raises(
            ValueError, match=r"a group of 8, strips of 1 .* 49152 bytes .*; got group 16, strips 1, width 5$"
        ),
    ):
        launched(lambda x: effkernels.DepthwiseConvBNAct(8).half().eval()(x[:, :8, :7]))


@pytest.mark.parametrize(
    "launches, tile, message",
    [
        ("se_gate", {"group": 8}, "launches must be of one of expand_dwconv, .*, got 'se_gate'"),
        ("dwconv", {"group": 8}, "a tile of dwconv is group, strips, width, positive integers, got {'group': 8}"),
        ("pointwise_inference", {"pixels": 128, "channels": 0}, "positive integers, got .*0"),
        ("pointwise_inference", {"pixels": 128, "channels": 32.0}, "positive integers, got .*32.0"),
    ],
)
def test_bad_arguments(launches, tile, message):
    with pytest.raises(ValueError, match=message), use_tile(launches, **tile):
        pass


def test_no_kernels_to_set_a_tile_of(monkeypatch):
    monkeypatch.setattr(_native, "launchers", None)
    monkeypatch.setitem(_native.MISSING, "cuda", "no nvcc")
    with (
        pytest.raises(RuntimeError, match="use_tile: there are no CUDA kernels: no nvcc"),
        use_tile("dwconv", group=8, strips=1, width=1),
    ):
        pass
