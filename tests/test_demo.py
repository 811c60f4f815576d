"""`effkernels demo`, and the figures that it shows."""

import json

import pytest
import torch
from typer.testing import CliRunner

import effkernels
from effkernels import demo
from effkernels.cli import app
from effkernels.profiling import Spread, Workload, time_blocks
from effkernels.profiling.timing import STEP


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
    times = time_blocks({n: Workload(Recorder(n), x) for n in "ab"}, ["part"], repeats=4, seconds=60.0)
    assert calls == ["a", "b"] * 5
    assert times["a"][STEP].keys() == {"part", ""}
    assert times["a"][STEP]["part"].median <= times["a"][STEP][""].median
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(2.0, 3.0, 4.0)
