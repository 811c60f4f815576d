"""The scripts in examples/ run."""

import pathlib
import runpy

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
