"""`effkernels demo`."""

import json

import torch
from typer.testing import CliRunner

from effkernels.cli import app
from effkernels.profiling import measure


def test_demo_profiles_efficientnet_b0(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "RECORDS", 1)
    monkeypatch.setattr(measure, "peak_bytes", lambda *_: None)
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--threads", "1"], env={"COLUMNS": "80"})
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "features.2.0" in result.output and "whole network" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["model"], report["what"], report["machine"]["threads"]) == ("efficientnet_b0", "inference", "1")
    assert report["input"] == "8 images of 224x224, float32"
    assert len(report["runs"]["eager"]["blocks"]) == 20  # and what is outside of them
    assert (tmp_path / "blocks.png").exists() and (tmp_path / "index.html").exists()
