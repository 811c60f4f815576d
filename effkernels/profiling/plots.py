"""The pictures of a report."""

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from effkernels.profiling import launches as kinds
from effkernels.profiling.gpus import Ceilings
from effkernels.profiling.launches import KINDS, Launch
from effkernels.profiling.passes import Lane, Pass, lanes_of, names_of, passes_of
from effkernels.profiling.report import EAGER, FUSED, Report
from effkernels.profiling.timing import STEP, Spread
from effkernels.profiling.workload import BACKWARD, FORWARD

# Okabe and Ito's palette, told apart by all.
COLORS = {EAGER: "#E69F00", FUSED: "#0072B2"}
KIND_COLORS = dict(
    zip(KINDS, ("#56B4E9", "#0072B2", "#999999", "#E69F00", "#F0E442", "#009E73", "#D55E00", "#CC79A7"), strict=True)
)
# Of our ops, whose names begin so, the kind of their main work.
MAIN_WORK = {
    "pointwise": kinds.POINTWISE,
    "dwconv": kinds.DEPTHWISE,
    "expand_dwconv": kinds.DEPTHWISE,
    "bn_": kinds.NORM,
    "conv_": kinds.DENSE,
}
WHOLE_BLOCK, GRAY, LINE = "#332288", "#555555", "#333333"
REST = "the rest"
DPI = 110

CAPTIONS = {
    "blocks": "Time and memory traffic of each block.",
    "kinds": "Memory traffic by kind of op. Hatched: ops of effkernels, by name, in the colour of their main work.",
    "roofline": "Each launch with operations is a point, its area its time. The lines are what the device allows.",
    "passes": "What goes over the maps of one block: each row is a launch, open circles are reads, full ones writes.",
}


def blocks(report: Report) -> bytes:
    figure, (times, traffic) = _figure(11, 6.6, 2, sharex=True)
    names = report.names
    positions = np.arange(len(names))
    width = 0.8 / len(report.runs)
    for i, (name, run) in enumerate(report.runs.items()):
        at = positions + (i - (len(report.runs) - 1) / 2) * width
        spreads = [run.times[STEP][b] for b in names]
        medians = [s.median for s in spreads]
        layout = "" if report.modelled else f" ({run.layout})"
        label = f"{name}{layout}: {run.total.median:.{2 if report.modelled else 1}f} ms"
        times.bar(at, medians, width, color=COLORS[name], label=label)
        if BACKWARD in run.times:
            nothing = Spread(0, 0, 0)
            forward = [run.times[FORWARD].get(b, nothing).median for b in names]
            times.bar(at, forward, width, color="none", edgecolor="white", hatch="////", linewidth=0)
        if not report.modelled:
            quartiles = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
            times.errorbar(at, medians, quartiles, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        label = f"{name}: {run.bytes() / 1e6:.0f} MB"
        traffic.bar(at, [run.bytes(b) / 1e6 for b in names], width, color=COLORS[name], label=label)
    if report.train:
        times.bar([0], [0], color="#aaaaaa", edgecolor="white", hatch="////", linewidth=0, label="of it forward")
    times.set_ylabel(f"time [ms], {report.verb}")
    traffic.set_ylabel("memory traffic [MB], counted")
    if report.compared:
        times.set_title(report.faster, fontsize=11, loc="left")
        traffic.set_title(f"{report.fewer_bytes:.2f}x fewer bytes", fontsize=11, loc="left")
    traffic.set_xticks(positions, names, rotation=40, ha="right", rotation_mode="anchor")
    for axes in (times, traffic):
        axes.legend(frameon=False)
        axes.grid(axis="y", color="#dddddd")
        axes.margins(x=0.01)
    return _png(figure, report)


def kinds_of_bytes(report: Report) -> bytes:
    figure, (axes,) = _figure(9, 6, 1)
    highest = max(run.bytes() for run in report.runs.values()) / 1e6
    places = [2.3 * i for i in range(len(report.runs))]
    for x, run in zip(places, report.runs.values(), strict=True):
        bottom, wanted, labels = 0.0, [], []
        for kind, amount in _by_kind(run.launches):
            hatch = None if kind in (*KINDS, REST) else "//"
            axes.bar(x, amount, 0.8, bottom=bottom, color=_color(kind), edgecolor="white", linewidth=0.8, hatch=hatch)
            wanted.append(bottom + amount / 2)
            labels.append(f"{kind}: {amount:.0f} MB")
            bottom += amount
        axes.annotate(f"{bottom:.0f} MB", (x, bottom), (0, 4), textcoords="offset points", ha="center", weight="bold")
        line = {"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
        for y, middle, label in zip(_apart(wanted, 0.042 * highest), wanted, labels, strict=True):
            axes.annotate(label, (x + 0.4, middle), (x + 0.55, y), fontsize=9, va="center", arrowprops=line)
    axes.set_xticks(places, list(report.runs))
    axes.set_xlim(-0.6, places[-1] + 2)
    axes.set_ylim(0, 1.08 * highest)
    axes.set_ylabel("memory traffic [MB], counted")
    axes.grid(axis="y", color="#eeeeee")
    return _png(figure, report)


def _by_kind(launches: list[Launch]) -> list[tuple[str, float]]:
    """The megabytes of each kind, PyTorch's first; kinds of next to nothing are taken together."""
    amounts = Counter[str]()
    for launch in launches:
        amounts[launch.kind] += launch.bytes
    large = {kind: amount for kind, amount in amounts.items() if amount >= 0.015 * amounts.total()}
    rest = amounts.total() - sum(large.values())
    order = sorted(large, key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))
    return [(kind, large[kind] / 1e6) for kind in order] + ([(REST, rest / 1e6)] if rest else [])


def _apart(wanted: list[float], gap: float) -> list[float]:
    """Places near those, from the lowest up, each at least `gap` over the one before, the first one over half of it."""
    places: list[float] = []
    for y in wanted:
        places.append(max(y, places[-1] + gap if places else gap / 2))
    return places


def _color(kind: str) -> str:
    if kind in KIND_COLORS:
        return KIND_COLORS[kind]
    if kind == REST:
        return "#dddddd"
    if kind.startswith("mbconv"):
        return WHOLE_BLOCK
    return KIND_COLORS[next((k for prefix, k in MAIN_WORK.items() if kind.startswith(prefix)), kinds.SQUEEZE)]


def roofline(report: Report) -> bytes:
    figure, (axes,) = _figure(9, 6, 1)
    ceilings = report.ceilings
    points = {
        name: [launch for launch in run.launches if launch.flops.total and launch.milliseconds > 0]
        for name, run in report.runs.items()
    }
    every = [launch for found in points.values() for launch in found]
    low = min([1.0, *map(_intensity, every)]) / 2
    high = 2 * max([*map(_intensity, every), 4 * ceilings.matrix / ceilings.bandwidth])
    _draw_ceilings(axes, ceilings, low, high)
    longest = max([launch.milliseconds for launch in every], default=1)
    for (name, found), marker in zip(points.items(), "os", strict=False):
        without = [launch for launch in report.runs[name].launches if not launch.flops.total]
        share = sum(a.milliseconds for a in without) / sum(a.milliseconds for a in report.runs[name].launches)
        axes.scatter(
            [_intensity(launch) for launch in found],
            [_rate(launch) / 1e9 for launch in found],
            [12 + 220 * launch.milliseconds / longest for launch in found],
            marker=marker,
            facecolors=COLORS[name] if name == EAGER else "none",
            edgecolors=COLORS[name],
            alpha=0.7,
            label=f"{name}; {share:.0%} of its time has no operations, and no point here",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min([*map(_rate, every), low * ceilings.bandwidth]) / 3e9, ceilings.matrix / 1e9 * 3)
    axes.set_xlabel("operations per byte of memory traffic, counted")
    axes.set_ylabel(f"operations per second [10\u2079/s], {report.verb}")
    axes.grid(color="#eeeeee")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    return _png(figure, report)


def _draw_ceilings(axes: Any, ceilings: Ceilings, low: float, high: float) -> None:
    x = np.geomspace(low, high, 200)
    peaks = [(ceilings.matrix, "-", "matrix products")]
    if ceilings.vector != ceilings.matrix:
        peaks.append((ceilings.vector, "--", "float32, without matrix units"))
    text: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 9, "color": LINE}
    for peak, style, what in peaks:
        axes.plot(x, np.minimum(x * ceilings.bandwidth, peak) / 1e9, style, color=LINE, linewidth=1.2)
        rate = f"{peak / 1e12:.1f} T/s" if peak >= 1e12 else f"{peak / 1e9:.0f} G/s"
        axes.annotate(f"{what}: {rate}", (high, peak / 1e9), (-6, 4), **text)
    middle = (low * ceilings.vector / ceilings.bandwidth) ** 0.5
    gigabytes = ceilings.bandwidth / 1e9
    axes.annotate(f"memory: {gigabytes:.0f} GB/s", (middle, middle * gigabytes), (-8, 6), **text)


def _intensity(launch: Launch) -> float:
    return launch.flops.total / max(launch.bytes, 1)


def _rate(launch: Launch) -> float:
    return 1000 * launch.flops.total / launch.milliseconds


def passes(report: Report) -> bytes:
    block = max(report.blocks, key=lambda name: (_is_mbconv(report, name), report.runs[EAGER].bytes(name)))
    found = {name: passes_of(run.by_block[block]) for name, run in report.runs.items()}
    lanes = lanes_of(launch for of_run in found.values() for launch in of_run)
    rows = max(map(len, found.values()))
    figure, axes = _figure(5.2 * len(found) + 0.6, 1.9 + 0.21 * (rows + 3), 1, len(found))
    for (name, of_run), panel in zip(found.items(), axes, strict=True):
        _draw_passes(panel, of_run, lanes, rows, COLORS[name])
        panel.set_title(
            f"{name}: {len(of_run)} {'launch' if len(of_run) == 1 else 'launches'} over maps",
            fontsize=10,
            loc="left",
            color="#333333",
            pad=36,
        )
    return _png(figure, report, f"block {block}; ")


def _is_mbconv(report: Report, block: str) -> bool:
    return any(launch.flops.depthwise for launch in report.runs[EAGER].by_block[block])


def _draw_passes(axes: Any, found: list[Pass], lanes: list[Lane], rows: int, color: str) -> None:
    axes.set_ylim(rows + 1.5, -0.7)
    axes.set_xlim(-2.6, len(lanes) - 0.5)
    axes.axis("off")
    for at, label in enumerate(names_of(lanes)):
        axes.plot([at, at], [-0.6, rows + 0.1], color="#cccccc", linewidth=1, zorder=0)
        axes.text(at, -0.9, label, ha="center", va="bottom", fontsize=8)
    previous = FORWARD
    for y, (launch, reads, writes) in enumerate(found):
        if launch.phase != previous:
            axes.plot([-2.6, len(lanes) - 0.5], [y - 0.5, y - 0.5], color=GRAY, linewidth=0.8, linestyle=":")
            axes.text(-2.6, y - 0.55, "backward", fontsize=7, color=GRAY, va="bottom")
            previous = launch.phase
        axes.text(-0.45, y, _what(launch), ha="right", va="center", fontsize=8)
        touched = [lanes.index(lane) for lane in (*reads, *writes)]
        axes.plot([min(touched), max(touched)], [y, y], color=color, linewidth=1.2, zorder=1)
        for at, lane in enumerate(lanes):
            marks = ["white"] * round(reads.get(lane, 0)) + [color] * round(writes.get(lane, 0))
            for i, fill in enumerate(marks):
                x = at + 0.13 * (i - (len(marks) - 1) / 2)
                axes.plot(x, y, "o", markersize=5.5, markerfacecolor=fill, markeredgecolor=color, zorder=2)
    axes.text(-0.45, rows + 0.8, "passes", ha="right", va="center", fontsize=8, weight="bold")
    for at, lane in enumerate(lanes):
        total = sum(round(r.get(lane, 0)) + round(w.get(lane, 0)) for _, r, w in found)
        axes.text(at, rows + 0.8, str(total), ha="center", va="center", fontsize=9, weight="bold")


def _what(launch: Launch) -> str:
    if "convolution" in launch.op:  # PyTorch's own, which all have one name
        return launch.kind + ("" if launch.phase == FORWARD else ", backward")
    return launch.op.removeprefix("aten::")


def _figure(width: float, height: float, *shape: int, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(*shape, **options))
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return figure, axes


def _png(figure: Any, report: Report, what: str = "") -> bytes:
    figure.suptitle(what + report.conditions, fontsize=8.5, color=GRAY, x=0.01, ha="left", wrap=True)
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, pil_kwargs={"optimize": True})
    return file.getvalue()


PLOTS: dict[str, Callable[[Report], bytes]] = {
    "blocks": blocks,
    "kinds": kinds_of_bytes,
    "roofline": roofline,
    "passes": passes,
}
