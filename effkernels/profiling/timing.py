"""Time, measured: several models on one input, in turns, block by block."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effkernels.profiling._hooks import around_blocks

MINIMUM_REPEATS = 3
TOTAL = ""  # the name of the whole model among its blocks


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


def time_blocks(
    models: Mapping[Any, nn.Module],
    blocks: Sequence[str],
    inputs: Mapping[Any, Tensor],
    *,
    repeats: int,
    seconds: float,
    on_repeat: Callable[[], None] = lambda: None,
) -> dict[Any, dict[str, Spread]]:
    """Time each model on its input, and each of its submodules named `blocks`, in inference.

    The models take turns within each of at most `repeats`, so that what else the machine does disturbs all of them
    alike. None starts after `seconds`, but for the first `MINIMUM_REPEATS`.

    Returns:
        Of each model, the time of each block, and of the whole under the name "".
    """
    samples: dict[Any, dict[str, list[float]]] = {key: {name: [] for name in (*blocks, TOTAL)} for key in models}
    deadline = time.perf_counter() + seconds
    for repeat in range(repeats + 1):
        if repeat > MINIMUM_REPEATS and time.perf_counter() > deadline:
            break
        for key, model in models.items():
            times = _time_once(model, blocks, inputs[key])
            if repeat > 0:  # the first one warms up
                for name, value in times.items():
                    samples[key][name].append(value)
        on_repeat()
    return {key: {name: Spread.of(values) for name, values in names.items()} for key, names in samples.items()}


def _time_once(model: nn.Module, blocks: Sequence[str], x: Tensor) -> dict[str, float]:
    marks: dict[str, list[Any]] = {name: [] for name in (*blocks, TOTAL)}

    def mark(name: str) -> None:
        if x.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks[name].append(event)
        else:
            marks[name].append(time.perf_counter())

    with torch.no_grad(), around_blocks(model, blocks, mark, mark):
        mark(TOTAL)
        model(x)
        mark(TOTAL)
    if x.is_cuda:
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, (start, end) in marks.items()}
    return {name: 1000 * (end - start) for name, (start, end) in marks.items()}
