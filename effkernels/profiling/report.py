"""Eager beside effkernels, block by block: as a table, a plot, JSON and one HTML file."""

import base64
import importlib.metadata
import io
import json
import pathlib
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Column, Table

import effkernels
from effkernels import _native
from effkernels.profiling.timing import Spread

EAGER, FUSED = "eager", "effkernels"
COLORS = {EAGER: "#E69F00", FUSED: "#0072B2"}  # of Okabe and Ito's palette, told apart by all
HOW = (
    "Times are measured: medians of repeated runs in inference, eager and effkernels in turns, each in its faster "
    "memory layout; whiskers are quartiles, and \u00b1 is half the distance between them. Bytes are counted, not "
    "measured: each op that runs reads its inputs and writes its outputs once, weights included; caches, and copies "
    "inside a library's kernels, are left out."
)


@dataclass(frozen=True)
class Run:
    """One implementation's costs, in its faster memory layout."""

    layout: str
    other_layout_ms: float
    total: Spread
    milliseconds: dict[str, Spread]  # of each block
    bytes: dict[str, int]  # of each block
    error: float  # relative L2 error of the output against float64

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Report:
    model: str
    image: str
    input: str
    runs: dict[str, Run]
    machine: dict[str, str]

    @property
    def blocks(self) -> list[str]:
        return [*self.runs[EAGER].bytes]

    @property
    def speedup(self) -> float:
        return self.runs[EAGER].total.median / self.runs[FUSED].total.median

    @property
    def fewer_bytes(self) -> float:
        return self.runs[EAGER].total_bytes / self.runs[FUSED].total_bytes

    @property
    def conditions(self) -> str:
        shown = ("device", "threads", "torch", "effkernels")
        facts = ", ".join(self.machine[k] if k == "device" else f"{k} {self.machine[k]}" for k in shown)
        return f"{self.model}, inference, {self.input}; {facts}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup, "fewer_bytes": self.fewer_bytes, "how": HOW}

    def write(self, folder: pathlib.Path) -> None:
        """Write index.html, blocks.png and report.json."""
        import jinja2

        folder.mkdir(parents=True, exist_ok=True)
        plot = self._plot()
        (folder / "blocks.png").write_bytes(plot)
        (folder / "report.json").write_text(json.dumps(self.as_json(), indent=1) + "\n")
        environment = jinja2.Environment(loader=jinja2.PackageLoader("effkernels.profiling", "."), autoescape=True)
        page = environment.get_template("report.html.j2").render(
            report=self, how=HOW, eager=self.runs[EAGER], fused=self.runs[FUSED], plot=base64.b64encode(plot).decode()
        )
        (folder / "index.html").write_text(page)

    def table(self) -> Table:
        eager, fused = self.runs[EAGER], self.runs[FUSED]
        names = ("eager\nms", "effkernels\nms", "\nfaster", "eager\nMB", "effkernels\nMB", "\nfewer")
        columns = [Column("\nblock", no_wrap=True), *(Column(name, justify="right", no_wrap=True) for name in names)]
        table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=HOW, caption_justify="left")
        for name in self.blocks:
            costs = eager.milliseconds[name], fused.milliseconds[name], eager.bytes[name], fused.bytes[name]
            table.add_row(name, *_cells(*costs))
        table.add_section()
        table.add_row(
            "whole network", *_cells(eager.total, fused.total, eager.total_bytes, fused.total_bytes), style="bold"
        )
        return table

    def _plot(self) -> bytes:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 6.6), layout="constrained")
        times, traffic = figure.subplots(2, 1, sharex=True)
        positions = range(len(self.blocks))
        for shift, (name, run) in zip((-0.2, 0.2), self.runs.items(), strict=True):
            at = [p + shift for p in positions]
            spreads = [run.milliseconds[b] for b in self.blocks]
            medians = [s.median for s in spreads]
            quartiles = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            label = f"{name} ({run.layout}): {run.total.median:.1f} ms"
            times.bar(at, medians, 0.4, color=COLORS[name], label=label)
            times.errorbar(at, medians, quartiles, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
            label = f"{name}: {run.total_bytes / 1e6:.0f} MB"
            traffic.bar(at, [run.bytes[b] / 1e6 for b in self.blocks], 0.4, color=COLORS[name], label=label)
        times.set_ylabel("time [ms], measured")
        traffic.set_ylabel("memory traffic [MB], counted")
        times.set_title(f"{self.speedup:.2f}x faster", fontsize=11, loc="left")
        traffic.set_title(f"{self.fewer_bytes:.2f}x fewer bytes", fontsize=11, loc="left")
        traffic.set_xticks(positions, self.blocks, rotation=40, ha="right", rotation_mode="anchor")
        for axes in (times, traffic):
            axes.legend(frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd")
            axes.set_axisbelow(True)
            axes.margins(x=0.01)
        figure.suptitle(self.conditions, fontsize=9, color="#555555", x=0.01, ha="left")
        file = io.BytesIO()
        figure.savefig(file, dpi=150)
        return file.getvalue()


def _cells(eager: Spread, fused: Spread, eager_bytes: int, fused_bytes: int) -> list[str]:
    return [
        *(f"{s.median:.2f} \u00b1{s.half_range:.2f}" for s in (eager, fused)),
        f"{eager.median / fused.median:.2f}x",
        *(f"{b / 1e6:.1f}" for b in (eager_bytes, fused_bytes)),
        f"{eager_bytes / fused_bytes:.2f}x",
    ]


def machine(device: torch.device) -> dict[str, str]:
    """What a measurement depends on."""
    isa = _native.introspection.cpu_isa() if _native.introspection else "none"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "effkernels": effkernels.__version__,
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "instruction set of the C++ kernels": isa,
    }


def _cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
