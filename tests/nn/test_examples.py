"""The scripts in examples/ run."""

import pathlib
import runpy

import pytest
import zoo

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def test_swap(capsys):
    zoo.torchvision()
    runpy.run_path(str(EXAMPLES / "swap.py"))["main"](image_size=64, batch_size=2)
    output = capsys.readouterr().out
    assert "fused: 18 blocks" in output
    difference = next(line for line in output.splitlines() if line.startswith("relative difference"))
    assert float(difference.split()[-1]) < 1e-3


def test_train(capsys):
    runpy.run_path(str(EXAMPLES / "train.py"))["main"]()
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]


def test_digits(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    zoo.torchvision()
    script = runpy.run_path(str(EXAMPLES / "digits.py"))
    images, labels = script["digits"](32)
    few = images[:40].double(), labels[:40]
    runs = {name: [script["train"](name != "eager", 0, *few, 2, 10, 20)] * 2 for name in script["COLOURS"]}
    losses, expected = (runs[name][0]["losses"] for name in ("effkernels", "eager"))
    assert losses == pytest.approx(expected, rel=1e-9)  # of equal draws, before training multiplies the rounding
    assert losses[1] < losses[0]
    assert "accuracy" in script["summary"](runs)
    script["plot"](runs, tmp_path / "losses.png")
