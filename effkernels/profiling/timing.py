"""Time, measured: several workloads in turns, block by block."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from effkernels.profiling._hooks import around_blocks
from effkernels.profiling.workload import BACKWARD, FORWARD, Workload

MINIMUM_REPEATS = 3
TOTAL = ""  # the name of the whole model among its blocks
OUTSIDE = "(outside)"  # and of what is none's
STEP = "step"  # both phases


@dataclass(frozen=True)
class Spread:
    """The quartiles of repeated measurements, in milliseconds."""

    low: float
    median: float
    high: float

    @property
    def half_range(self) -> float:
        return (self.high - self.low) / 2

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        return cls(*statistics.quantiles(samples, n=4, method="inclusive"))


Times = dict[str, dict[str, Spread]]  # of each phase and block


def time_blocks(
    workloads: Mapping[Any, Workload],
    blocks: Sequence[str],
    *,
    repeats: int,
    seconds: float,
    on_repeat: Callable[[], None] = lambda: None,
) -> dict[Any, Times]:
    """Time each workload, and in it each of the submodules named `blocks`.

    They take turns within each of at most `repeats`, so that what else the machine does disturbs all of them alike.
    None starts after `seconds`, but for the first `MINIMUM_REPEATS`.

    Returns:
        Of each workload, phase by phase and as a step, the time of each block that ran, of what is outside of all
        blocks, and under the name "" of the whole. A block's backward lasts from the gradient of its output to that of
        the next block's.
    """
    samples: dict[Any, dict[tuple[str, str], list[float]]] = {key: defaultdict(list) for key in workloads}
    deadline = time.perf_counter() + seconds
    for repeat in range(repeats + 1):
        if repeat > MINIMUM_REPEATS and time.perf_counter() > deadline:
            break
        for key, workload in workloads.items():
            times = _time_once(workload, blocks)
            if repeat > 0:  # the first one warms up
                for place, value in times.items():
                    samples[key][place].append(value)
        on_repeat()
    found: dict[Any, Times] = {key: defaultdict(dict) for key in workloads}
    for key, places in samples.items():
        for (phase, name), values in places.items():
            found[key][phase][name] = Spread.of(values)
    return found


def stamp(device: torch.device) -> Any:
    """This moment on `device`; None where nothing is computed."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return None if device.type == "meta" else time.perf_counter()


def milliseconds(start: Any, end: Any) -> float:
    """Between two stamps, when all work has ended."""
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def _time_once(workload: Workload, blocks: Sequence[str]) -> dict[tuple[str, str], float]:
    device = workload.x.device
    starts: dict[str, Any] = {}
    forward: list[tuple[str, Any, Any]] = []
    backward: list[tuple[str, Any]] = []  # in the order in which they start

    def before(name: str, _: Any) -> None:
        starts[name] = stamp(device)

    def after(name: str, outputs: Any) -> None:
        forward.append((name, starts[name], stamp(device)))
        for t in tree_leaves(outputs):
            if name != TOTAL and isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(lambda _: backward.append((name, stamp(device))))

    with around_blocks(workload.model, (*blocks, TOTAL), before, after):
        workload.run(before_backward=lambda: backward.append((TOTAL, stamp(device))))
    backward.append(("the end", stamp(device)))
    if device.type == "cuda":
        torch.cuda.synchronize()
    times: dict[tuple[str, str], float] = defaultdict(float)
    for name, start, end in forward:
        times[FORWARD, name] += milliseconds(start, end)
    for (name, start), (_, end) in pairwise(backward):
        times[BACKWARD, name] += milliseconds(start, backward[-1][1] if name == TOTAL else end)
    for phase in {phase for phase, _ in times}:
        inside = sum(elapsed for (p, name), elapsed in times.items() if p == phase and name != TOTAL)
        times[phase, OUTSIDE] = times[phase, TOTAL] - inside
    for (_, name), elapsed in [*times.items()]:
        times[STEP, name] += elapsed
    return times
