"""How workloads are timed."""

import time

import torch

from effkernels.profiling import Spread, Workload, time_blocks
from effkernels.profiling.timing import OUTSIDE, STEP
from effkernels.profiling.workload import BACKWARD


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
    assert times["a"][STEP].keys() == {"part", "", OUTSIDE}
    assert times["a"][STEP]["part"].median <= times["a"][STEP][""].median
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(2.0, 3.0, 4.0)


def test_backward_is_divided_among_the_blocks():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.05)
            return grad

    class Sleeper(torch.nn.Module):
        def forward(self, x):
            return Slow.apply(x)

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Sleeper(), torch.nn.Linear(4, 4))
    workload = Workload(model, torch.zeros(2, 4), train=True)
    backward = time_blocks({"a": workload}, ["0", "1", "2"], repeats=3, seconds=60.0)["a"][BACKWARD]
    assert backward["1"].low >= 50
    assert backward["0"].median < 50 and backward["2"].median < 50
    assert backward[""].low >= backward["1"].low
