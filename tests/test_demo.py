"""`effkernels demo`, and the figures that it shows."""

import json

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import effkernels
from effkernels import demo
from effkernels.cli import app
from effkernels.profiling import Spread, block_bytes, count_bytes, time_blocks


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_demo_writes_a_report_of_every_block(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--threads", "1"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert "features.2.0" in result.output and "whole network" in result.output

    report = json.loads((tmp_path / "report.json").read_text())
    eager, fused = report["runs"]["eager"], report["runs"]["effkernels"]
    assert eager["milliseconds"].keys() == fused["bytes"].keys()
    assert len(eager["bytes"]) == 19
    assert report["machine"]["threads"] == "1"
    assert report["machine"]["torch"] == torch.__version__
    assert sum(eager["bytes"].values()) > sum(fused["bytes"].values())
    page = (tmp_path / "index.html").read_text()
    assert "data:image/png;base64," in page and 'src="http' not in page
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_where_outputs_disagree(tmp_path, monkeypatch):
    def convert_wrongly(model):
        with torch.no_grad():
            model.classifier[1].bias += 1e-3
        return model

    monkeypatch.setattr(effkernels, "convert", convert_wrongly)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "report")])
    assert isinstance(result.exception, RuntimeError)
    assert "the outputs disagree" in str(result.exception)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_bytes_of_an_mbconv_are_its_passes(fused):
    """Passes over the block's input, its expanded tensor before and after the depthwise convolution, its output."""
    block = torchvision.models.efficientnet_b0().features[2][1].eval()
    x = torch.randn(2, 24, 64, 64)
    if fused:
        effkernels.convert(block)
    sizes = x.nbytes, 6 * x.nbytes, 6 * x.nbytes, x.nbytes
    passes = (2, 0, 2, 1) if fused and not effkernels._native.MISSING["cpp"] else (2, 6, 9, 5)
    maps = sum(size * count for size, count in zip(sizes, passes, strict=True))
    got = block_bytes(torch.nn.Sequential(block), ["0"], x)["0"]
    assert maps <= got <= 1.02 * maps  # weights and means of channels are counted too


@pytest.mark.skipif(effkernels._native.MISSING["triton"] is not None, reason="triton is not installed")
def test_bytes_of_an_mbconv_on_a_gpu():
    """In Triton squeeze-excite scales d, and BatchNorm normalises the projection, in passes of their own."""
    with FakeTensorMode(), torch.device("cuda"), effkernels.use_backend("triton"):
        block = effkernels.convert(torchvision.models.efficientnet_b0().features[2][1].eval())
        x = torch.randn(2, 24, 64, 64).to(memory_format=torch.channels_last)
        got = block_bytes(torch.nn.Sequential(block), ["0"], x)["0"]
    maps = (2 + 6 * 2 + 6 * 4 + 3) * x.nbytes
    assert maps <= got <= 1.02 * maps


def test_views_cost_nothing_and_updates_in_place_a_read_and_a_write():
    x = torch.zeros(1000)
    assert count_bytes(lambda: x.view(10, 100).t()) == 0
    assert count_bytes(lambda: x.add_(1)) == 2 * x.nbytes
    assert count_bytes(lambda: torch.empty_like(x)) == count_bytes(lambda: x.new_empty(9)) == 0


def test_models_are_timed_in_turns_and_the_first_run_is_left_out():
    calls = []

    class Recorder(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.part = name, torch.nn.Identity()

        def forward(self, x):
            calls.append(self.name)
            return self.part(x)

    x = torch.zeros(1)
    times = time_blocks({n: Recorder(n) for n in "ab"}, ["part"], {n: x for n in "ab"}, repeats=4, seconds=60.0)
    assert calls == ["a", "b"] * 5
    assert times["a"].keys() == {"part", ""}
    assert times["a"]["part"].median <= times["a"][""].median
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(2.0, 3.0, 4.0)
