"""benchmarks/phases.py times every phase of a training step."""

import pathlib
import re
import runpy
import sys

FILE = pathlib.Path(__file__).parents[1] / "benchmarks" / "phases.py"


def test_every_phase_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["phases.py", "--device", "cpu", "--batch", "1", "--size", "64"])
    runpy.run_path(str(FILE), run_name="__main__")
    rows = re.findall(r"^(\w+) +(\d+) +\d+ +(\d+)$", capsys.readouterr().out, re.MULTILINE)
    calls = {name: int(count) for name, count, _ in rows}
    # One expansion and one projection, but for block 1; moments and a correction where a block expands on chip.
    assert calls["pointwise"] == calls["pointwise_backward"] == 31
    assert calls["expand_dwconv"] == calls["expand_dwconv_gradients"] == 3
    assert calls["dwconv"] == calls["dwconv_backward"] == 16 - 3
    assert calls["se_gate"] == calls["se_gate_backward"] == 16
    assert all(int(microseconds) > 0 for *_, microseconds in rows)
