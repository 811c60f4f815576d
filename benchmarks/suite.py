"""What the benchmarks share: shapes, layouts, implementations, and ratios of one run."""

import csv
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import effkernels
from effkernels import backends

SHAPES = pathlib.Path(__file__).parent / "shapes"
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BATCH = 8
KERNELS = [name for name in backends.PREFERENCE if name != "eager" and not backends.why_not(name, torch.empty(1))]
ROUNDS = 30


class Shape(NamedTuple):
    """The depthwise convolution of a block, its squeeze-excite width, and how much faster than eager it shall be."""

    channels: int
    size: int
    kernel_size: int
    stride: int
    se_channels: int
    target: float | None

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size}-k{self.kernel_size}s{self.stride}"


def shapes(model: str) -> list[Shape]:
    with (SHAPES / f"{model}.csv").open() as file:
        return [
            Shape(*(int(row[field]) for field in Shape._fields[:-1]), float(row["target"]) if row["target"] else None)
            for row in csv.DictReader(file)
        ]


def on(backend: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with effkernels.use_backend(backend):
            return function()

    return run


def _in_turns(benchmark: Any, variants: dict[Any, Callable[[], Any]], rounds: int = ROUNDS) -> dict[Any, list[float]]:
    """The seconds of each variant's calls, one of each per round."""
    samples: dict[Any, list[float]] = {key: [] for key in variants}

    def one_round() -> None:
        for key, call in variants.items():
            start = time.perf_counter()
            call()
            samples[key].append(time.perf_counter() - start)

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=3)
    return {key: values[3:] for key, values in samples.items()}


def compare(benchmark: Any, variants: dict[tuple[str, str], Callable[[], Any]], target: float | None) -> None:
    """Time (implementation, layout) variants in turns, one call of each per round, and keep their ratios.

    Each round is compared with itself: what disturbs the machine for longer than a round disturbs both sides.
    """
    kept = _in_turns(benchmark, variants)
    medians = {key: statistics.median(values) for key, values in kept.items()}
    eager = min((key for key in variants if key[0] == "eager"), key=medians.__getitem__)
    implementation = next(name for name, _ in variants if name != "eager")
    best, other = sorted(((implementation, layout) for layout in LAYOUTS), key=medians.__getitem__)
    benchmark.extra_info.update(
        milliseconds={f"{name} {layout}": 1000 * medians[name, layout] for name, layout in variants},
        eager_layout=eager[1],
        layout=best[1],
        faster=_quartiles(kept[eager], kept[best]),
        backend=implementation,
        other_layout=_quartiles(kept[best], kept[other]),
        target=target,
    )


def compare_with_best(
    benchmark: Any, variants: dict[str, Callable[[], Any]], ours: str, target: float, rounds: int = 10
) -> None:
    """Time `variants` in turns; keep how much faster those whose name begins with `ours` are than the best other."""
    kept = _in_turns(benchmark, variants, rounds)
    medians = {key: statistics.median(values) for key, values in kept.items()}
    best = min((key for key in variants if not key.startswith(ours)), key=medians.__getitem__)
    benchmark.extra_info.update(
        milliseconds={key: 1000 * value for key, value in medians.items()},
        best=best,
        against_best={key: _quartiles(kept[best], kept[key]) for key in variants if key.startswith(ours)},
        target=target,
    )


def keep_bytes(benchmark: Any, found: dict[str, int], at_most: float) -> None:
    """Keep what each implementation takes, and how much effkernels may take."""
    benchmark.extra_info.update(mebibytes={key: value / 2**20 for key, value in found.items()}, at_most=at_most / 2**20)


def _quartiles(numerators: list[float], denominators: list[float]) -> list[float]:
    return statistics.quantiles([a / b for a, b in zip(numerators, denominators, strict=True)], n=4)
