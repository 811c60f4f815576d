"""Eager beside effkernels, block by block: as a table, plots, JSON and one HTML file."""

import base64
import importlib.metadata
import json
import pathlib
import platform
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table

import effkernels
from effkernels import _native
from effkernels.profiling.gpus import LAUNCH_SECONDS, LEFT_OUT, Ceilings
from effkernels.profiling.kernels import Kernel
from effkernels.profiling.launches import Launch
from effkernels.profiling.timing import OUTSIDE, STEP, TOTAL, Spread, Times

EAGER, FUSED = "eager", "effkernels"
COUNTED = (
    "Bytes and operations are counted, not measured: each op that runs reads its inputs and writes its outputs once "
    "(twice where a library is known to), weights included; caches, and copies inside a library's kernels, are left "
    "out. Operations are those of convolutions and matrix products, two for a multiply-add."
)
MEASURED = (
    "Times are measured: medians of repeated runs, eager and effkernels in turns, each in its faster memory layout; "
    "whiskers are quartiles, and \u00b1 is half the distance between them. Ceilings are measured in the same run: a "
    "large copy, and large matrix products. A block's share of them is the least time that they allow for its bytes "
    "and operations, divided by its time; caches can lift it over 100 %. "
)
MODELLED = (
    "All times are modelled, none is measured: a launch takes the longest of its bytes at the memory's bandwidth, its "
    "matrix products at the peak of the dtype, its depthwise convolutions at that of float32, all by the data sheet, "
    f"and {1e6 * LAUNCH_SECONDS:g} \u00b5s, which is assumed. Left out are {LEFT_OUT}. effkernels runs C++/CUDA, in "
    "training beside Triton. "
)


@dataclass(frozen=True)
class Run:
    """One implementation's costs, in its faster memory layout."""

    backend: str
    layout: str
    other_layout_ms: float | None
    times: Times
    launches: list[Launch]
    kernels: list[Kernel]
    saved_bytes: int | None  # for backward
    peak_bytes: int | None
    error: float | None  # relative L2 error of what comes out against float64

    @property
    def total(self) -> Spread:
        return self.times[STEP][TOTAL]

    @cached_property
    def by_block(self) -> dict[str, list[Launch]]:
        found = defaultdict(list)
        for launch in self.launches:
            found[launch.block or OUTSIDE].append(launch)
            found[TOTAL].append(launch)
        return found

    def bytes(self, block: str = TOTAL) -> int:
        return sum(launch.bytes for launch in self.by_block[block])

    def flops(self, block: str = TOTAL) -> int:
        return sum(launch.flops.total for launch in self.by_block[block])

    def kernel_launches(self, block: str = TOTAL) -> int:
        return sum(launch.kernels for launch in self.by_block[block])

    def reached(self, ceilings: Ceilings, block: str = TOTAL) -> float:
        """The share of the ceilings that a block's time comes to."""
        bound = sum(ceilings.bound(launch) for launch in self.by_block[block])
        return 1000 * bound / (self.times[STEP][block].median or 1)


@dataclass(frozen=True)
class Row:
    """A block's figures, of every implementation in turn."""

    name: str
    times: list[Spread]
    bytes: list[int]
    gflops: list[float]
    intensity: list[float]  # operations per byte
    reached: list[float]


@dataclass(frozen=True)
class Report:
    model: str
    image: str | None
    input: str
    train: bool
    modelled: bool
    blocks: list[str]
    ceilings: Ceilings
    runs: dict[str, Run]
    machine: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Blocks, and what is outside of them."""
        return [*self.blocks, *([OUTSIDE] if any(run.by_block[OUTSIDE] for run in self.runs.values()) else [])]

    @property
    def what(self) -> str:
        return "training step (forward and backward)" if self.train else "inference"

    @property
    def verb(self) -> str:
        return "modelled" if self.modelled else "measured"

    @property
    def how(self) -> str:
        return (MODELLED if self.modelled else MEASURED) + COUNTED

    @property
    def compared(self) -> bool:
        return FUSED in self.runs

    @property
    def speedup(self) -> float:
        return self.runs[EAGER].total.median / self.runs[FUSED].total.median

    @property
    def faster(self) -> str:
        return f"{self.speedup:.2f}x faster" if self.speedup >= 1 else f"{1 / self.speedup:.2f}x slower"

    @property
    def fewer_bytes(self) -> float:
        return self.runs[EAGER].bytes() / self.runs[FUSED].bytes()

    @property
    def conditions(self) -> str:
        shown = ["device", *([] if self.modelled else ["threads"]), "torch", "effkernels"]
        facts = ", ".join(self.machine[k] if k == "device" else f"{k} {self.machine[k]}" for k in shown)
        return f"{self.model}, {self.what}, {self.input}; {'modelled for ' if self.modelled else ''}{facts}"

    @property
    def summary(self) -> str:
        if not self.compared:
            return f"{self.runs[EAGER].total.median:.1f} ms, {self.verb}; nothing in it can be converted"
        return f"{self.faster} ({self.verb}), {self.fewer_bytes:.2f}x fewer bytes (counted)"

    def row(self, name: str) -> Row:
        runs = [*self.runs.values()]
        return Row(
            name or "whole network",
            [run.times[STEP][name] for run in runs],
            [run.bytes(name) for run in runs],
            [run.flops(name) / 1e9 for run in runs],
            [run.flops(name) / (run.bytes(name) or 1) for run in runs],
            [run.reached(self.ceilings, name) for run in runs],
        )

    def as_json(self) -> dict[str, Any]:
        ceilings = {"source": "data sheet" if self.modelled else "measured", **asdict(self.ceilings)}
        return {
            "model": self.model,
            "input": self.input,
            "image": self.image,
            "what": self.what,
            "times": self.verb,
            "how": self.how,
            "ceilings, per second": ceilings,
            "machine": self.machine,
            **({"speedup": self.speedup, "fewer_bytes": self.fewer_bytes} if self.compared else {}),
            "runs": {name: self._run_as_json(run) for name, run in self.runs.items()},
        }

    def _run_as_json(self, run: Run) -> dict[str, Any]:
        def costs(name: str) -> dict[str, Any]:
            return {
                "milliseconds": {phase: asdict(times[name]) for phase, times in run.times.items() if name in times},
                "bytes": run.bytes(name),
                "operations": run.flops(name),
                "launches": run.kernel_launches(name),
                "share of the ceilings": run.reached(self.ceilings, name),
            }

        facts = ("backend", "layout", "other_layout_ms", "saved_bytes", "peak_bytes", "error")
        return {
            **{fact: getattr(run, fact) for fact in facts},
            "total": costs(TOTAL),
            "blocks": {name: costs(name) for name in self.names},
            "ops": _ops(run.launches),
            "kernels": [kernel._asdict() for kernel in run.kernels],
        }

    def write(self, folder: pathlib.Path) -> None:
        """Write index.html, report.json and the plots."""
        import jinja2

        from effkernels.profiling import plots

        folder.mkdir(parents=True, exist_ok=True)
        pictures = {name: draw(self) for name, draw in plots.PLOTS.items()}
        for name, picture in pictures.items():
            (folder / f"{name}.png").write_bytes(picture)
        (folder / "report.json").write_text(json.dumps(self.as_json(), indent=1) + "\n")
        environment = jinja2.Environment(loader=jinja2.PackageLoader("effkernels.profiling", "."), autoescape=True)
        environment.filters["spread"] = _spread
        page = environment.get_template("report.html.j2").render(
            report=self,
            rows=[self.row(name) for name in self.names],
            total=self.row(TOTAL),
            captions=plots.CAPTIONS,
            pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
        )
        (folder / "index.html").write_text(page)

    def tables(self) -> RenderableType:
        """What a terminal shows."""
        parts: list[RenderableType] = [self._blocks_table()]
        if any(run.kernels for run in self.runs.values()):
            parts.append(self._kernels_table())
        parts.append(self._memory_table())
        return Group(*parts)

    def _blocks_table(self) -> Table:
        columns = [Column("\nblock", no_wrap=True)]
        for unit, ratio in (("ms", "faster"), ("MB", "fewer")):
            columns += [_number(f"{name}\n{unit}") for name in self.runs]
            columns += [_number(f"\n{ratio}")] * self.compared
        table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=self.how, caption_justify="left")
        for name in self.names:
            table.add_row(*_cells(self.row(name)))
        table.add_section()
        table.add_row(*_cells(self.row(TOTAL)), style="bold")
        return table

    def _kernels_table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="the longest kernels", title_justify="left")
        for name in self.runs:
            table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=22)
            table.add_column("calls", justify="right", no_wrap=True)
            table.add_column("ms", justify="right", no_wrap=True)
        for kernels in zip(*(run.kernels[:10] for run in self.runs.values()), strict=False):
            table.add_row(*(cell for k in kernels for cell in (k.name, f"{k.calls:.0f}", _figures(k.milliseconds))))
        return table

    def _memory_table(self) -> Table:
        table = Table("", *(_number(name) for name in self.runs), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name, cells in self.facts().items():
            table.add_row(name, *cells)
        return table

    def facts(self) -> dict[str, list[str]]:
        """What is told of a whole run, in words, of each implementation."""
        runs = [*self.runs.values()]
        facts = {
            "launches": [str(run.kernel_launches()) for run in runs],
            "operations, G": [f"{run.flops() / 1e9:.2f}" for run in runs],
            "% of the ceilings": [f"{100 * run.reached(self.ceilings):.0f}" for run in runs],
            "operations per byte": [f"{run.flops() / run.bytes():.1f}" for run in runs],
            "saved for backward, MB (counted)": [_megabytes(run.saved_bytes) for run in runs],
            f"peak memory, MB ({'of tensors, counted' if self.modelled else 'measured'})": [
                _megabytes(run.peak_bytes) for run in runs
            ],
            "in the other layout, ms": [_text(run.other_layout_ms, ".1f") for run in runs],
            "relative error against float64": [_text(run.error, ".1e") for run in runs],
        }
        return {name: cells for name, cells in facts.items() if any(cells)}


def _number(header: str) -> Column:
    return Column(header, justify="right", no_wrap=True)


def _spread(spread: Spread) -> str:
    return _figures(spread.median) + (f" \u00b1{_figures(spread.half_range)}" if spread.high > spread.low else "")


def _figures(number: float) -> str:
    """Three of them, or all before the point."""
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def _text(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def _megabytes(amount: int | None) -> str:
    return _text(None if amount is None else amount / 1e6, ".1f")


def _cells(row: Row) -> list[str]:
    times, amounts = [t.median for t in row.times], row.bytes
    cells = [row.name, *(_spread(t) for t in row.times)]
    cells += [f"{times[0] / times[1]:.2f}x"] if len(times) > 1 else []
    cells += [_figures(b / 1e6) for b in amounts]
    cells += [f"{amounts[0] / amounts[1]:.2f}x"] if len(times) > 1 else []
    return cells


def _ops(launches: list[Launch]) -> list[dict[str, Any]]:
    """The launches of each op of each block in each phase, taken together."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for launch in launches:
        place = {"block": launch.block, "phase": launch.phase, "op": launch.op, "kind": launch.kind}
        costs = {
            "launches": launch.kernels,
            "bytes": launch.bytes,
            "operations": launch.flops.total,
            "milliseconds": launch.milliseconds,
        }
        sums = found.setdefault(tuple(place.values()), {**place, **dict.fromkeys(costs, 0)})
        for name, cost in costs.items():
            sums[name] += cost
    return [*found.values()]


def machine(device: torch.device | None) -> dict[str, str]:
    """What a measurement on `device` depends on, or, with None, a model."""
    facts = {"effkernels": effkernels.__version__, "torch": torch.__version__}
    if device is None:
        return facts
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        **facts,
        "torchvision": importlib.metadata.version("torchvision"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "instruction set of the C++ kernels": _native.CPU_ISA,
    }


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
