"""`effkernels study`: MBConv against Fused-MBConv, as in table 3 of EfficientNetV2 (arXiv:2104.00298)."""

import io
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from torch import nn

from effkernels.models import Config, EfficientNet, multiply_adds
from effkernels.models.configs import CONFIGS
from effkernels.profile import Threads, require
from effkernels.profiling import GPU_BACKEND, GPUS, Launch, Spread, Workload, as_on_gpu, on_meta, record
from effkernels.profiling.gpus import GPU
from effkernels.profiling.launches import DENSE, DEPTHWISE, POINTWISE
from effkernels.profiling.report import EAGER, machine
from effkernels.profiling.report import FUSED as OURS
from effkernels.profiling.timing import STEP, TOTAL, time_blocks

IMPLEMENTATIONS = (EAGER, OURS)
Direction = Literal["inference", "training"]
VARIANTS = {"none": 0, "1-3": 3, "1-5": 5, "1-7": 7}  # how many stages are fused
# Images, in inference and in training on the CPU, and on a GPU. Training is a step without the optimiser.
BATCHES = {"efficientnet_b4": (1, 1, 32), "efficientnet_b0": (8, 8, 128)}
GPU_DTYPE = torch.float16
REPEATS, SECONDS = 15, 30.0  # per network and direction, whichever ends first
EARLY = 3  # stages that V2 fuses

# EfficientNet-B4: parameters (millions), operations (billions), images per second on a TPU core and on a V100.
PAPER = {
    "none": (19.3, 4.5, 262, 155),
    "1-3": (20.0, 7.5, 362, 216),
    "1-5": (43.4, 21.3, 327, 223),
    "1-7": (132.0, 34.4, 254, 206),
}
# The paper's own GPU, for this comparison alone: data sheet of the V100 (SXM2).
STUDIED = {"V100": GPU("V100", 900e9, 15.7e12, {torch.float16: 125e12}), **GPUS}


@dataclass(frozen=True)
class Network:
    name: str
    resolution: int
    parameters: dict[str, int]  # of each variant
    multiply_adds: dict[str, int]


@dataclass(frozen=True)
class Run:
    """The time per image of a variant of a network."""

    network: str
    fused: str
    implementation: str
    direction: Direction
    device: str
    modelled: bool
    batch: int
    milliseconds: Spread
    stages: tuple[float, ...]  # milliseconds of each
    early: dict[str, float]  # where modelled: milliseconds of the first three stages, by kind of work

    @property
    def images_per_second(self) -> float:
        return 1000 / self.milliseconds.median


@dataclass(frozen=True)
class Study:
    networks: tuple[Network, ...]
    runs: tuple[Run, ...]
    machine: dict[str, str]

    def run(self, network: str, fused: str, implementation: str, direction: str, device: str) -> Run:
        wanted = (network, fused, implementation, direction, device)
        return next(r for r in self.runs if (r.network, r.fused, r.implementation, r.direction, r.device) == wanted)

    def write(self, folder: pathlib.Path) -> None:
        """Write study.json, study.png and tables.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "study.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / "study.png").write_bytes(plot(self))
        (folder / "tables.md").write_text("\n\n".join(tables(self).values()) + "\n")

    @classmethod
    def read(cls, file: pathlib.Path) -> "Study":
        saved = json.loads(file.read_text())
        runs = (Run(**r | {"milliseconds": Spread(**r["milliseconds"])}) for r in saved["runs"])
        return cls(tuple(Network(**n) for n in saved["networks"]), tuple(runs), saved["machine"])


def study(
    out: Annotated[pathlib.Path, typer.Option(help="The folder to write to.")] = pathlib.Path("effkernels-study"),
    threads: Threads = None,
) -> None:
    """MBConv against Fused-MBConv in EfficientNet-B0 and B4, eager and fused: measured here, modelled on GPUs."""
    console = Console()
    require(console, "matplotlib")
    if threads:
        torch.set_num_threads(threads)
    with Progress(console=console, transient=True) as progress:
        found = conduct({name: (CONFIGS[name], *batches) for name, batches in BATCHES.items()}, progress)
    found.write(out)
    for table in terminal_tables(found):
        console.print(table)
    console.print(f"GPU times are modelled from counted bytes and operations; no GPU ran. See {out / 'study.png'}")


def replaced(config: Config, stages: int) -> Config:
    """`config` with MBConv replaced by Fused-MBConv in its first `stages` stages.

    Squeeze-excite stays, with its width. The dense convolutions are 3x3 in stages 1 to 3, and as large as the depthwise
    ones beyond: of the variants that come to mind this is the nearest to the parameters and operations of the paper,
    which does not tell.
    """
    fused = (
        replace(stage, block="fused", kernel_size=3 if i < EARLY else stage.kernel_size)
        for i, stage in enumerate(config.stages[:stages])
    )
    return replace(config, stages=(*fused, *config.stages[stages:]))


def conduct(networks: dict[str, tuple[Config, int, int, int]], progress: Progress) -> Study:
    """Measure and model each network, given with its batches as in `BATCHES`."""
    found: list[Network] = []
    runs: list[Run] = []
    for name, (config, *batches, gpu_batch) in networks.items():
        models = {fused: EfficientNet(replaced(config, stages)) for fused, stages in VARIANTS.items()}
        size = config.resolution
        found.append(
            Network(
                name,
                size,
                {fused: sum(p.numel() for p in model.parameters()) for fused, model in models.items()},
                {fused: multiply_adds(model, 1, 3, size, size) for fused, model in models.items()},
            )
        )
        for direction, batch in zip(get_args(Direction), batches, strict=True):
            steps = progress.add_task(f"{name}, {direction}", total=REPEATS + 1)
            advance = lambda steps=steps: progress.advance(steps)  # noqa: E731
            runs += _measured(name, models, direction, torch.randn(batch, 3, size, size), advance)
            progress.update(steps, completed=REPEATS + 1)
            runs += _modelled(name, models, direction, (gpu_batch, 3, size, size))
    return Study(tuple(found), tuple(runs), machine(torch.device("cpu")))


def _measured(
    network: str, models: dict[str, EfficientNet], direction: Direction, x: torch.Tensor, advance: Any
) -> Iterator[Run]:
    """On the CPU in float32 and channels_last, all in turns."""
    x = x.contiguous(memory_format=torch.channels_last)
    for model in models.values():
        model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = direction == "inference"  # where eager is faster so
        # With statistics of the input activations keep their scale.
        torch.optim.swa_utils.update_bn([x.repeat(2, 1, 1, 1)], model)
    workloads = {
        (fused, implementation): Workload(model, x, direction == "training", backend)
        for fused, model in models.items()
        for implementation, backend in zip(IMPLEMENTATIONS, ("eager", "auto"), strict=True)
    }
    names = _stages(next(iter(models.values())))
    times = time_blocks(workloads, names, repeats=REPEATS, seconds=SECONDS, on_repeat=advance)
    for (fused, implementation), phases in times.items():
        spreads = {block: _per_image(spread, len(x)) for block, spread in phases[STEP].items()}
        stages = tuple(spreads[name].median for name in names)
        place = network, fused, implementation, direction, "CPU", False, len(x)
        yield Run(*place, spreads[TOTAL], stages, {})


def _per_image(spread: Spread, batch: int) -> Spread:
    return Spread(*(ms / batch for ms in (spread.low, spread.median, spread.high)))


def _modelled(
    network: str, models: dict[str, EfficientNet], direction: Direction, shape: Sequence[int]
) -> Iterator[Run]:
    """On GPUs in float16, from counted bytes and operations."""
    train = direction == "training"
    for fused, model in models.items():
        names = _stages(model)
        for implementation, backend in zip(IMPLEMENTATIONS, ("eager", GPU_BACKEND), strict=True):
            with as_on_gpu():
                launches, _ = record(on_meta(model, shape, GPU_DTYPE, train=train, backend=backend), names)
            for gpu in STUDIED.values():
                ceilings = gpu.ceilings(GPU_DTYPE)
                times = [1000 * ceilings.seconds([launch]) / shape[0] for launch in launches]
                total = sum(times)
                stages: dict[str, float] = defaultdict(float)
                early: dict[str, float] = defaultdict(float)
                for launch, ms in zip(launches, times, strict=True):
                    stages[launch.block] += ms
                    if launch.block in names[:EARLY]:
                        early[_work(launch)] += ms
                place = network, fused, implementation, direction, gpu.name, True, shape[0]
                yield Run(*place, Spread(total, total, total), tuple(stages[n] for n in names), dict(early))


PASSES, PRODUCTS, FUSIONS = "passes around them", "dense and 1x1 convolutions", "fused kernels"


def _work(launch: Launch) -> str:
    if launch.op.startswith("aten::"):
        return {DEPTHWISE: DEPTHWISE, POINTWISE: PRODUCTS, DENSE: PRODUCTS}.get(launch.kind, PASSES)
    return FUSIONS


def _stages(model: EfficientNet) -> list[str]:
    return [f"stages.{i}" for i in range(len(model.stages))]


# --- What is shown.


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column to the left."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def tables(study: Study) -> dict[str, str]:
    """The tables of docs/v2_question.md, by name."""
    found = {}
    for network in study.networks:
        found[f"costs of {network.name}"] = _table(*_costs(network))
        found[f"throughput of {network.name}"] = _table(*_throughput(study, network))
        found[f"stages of {network.name}"] = _table(*_stage_ratios(study, network))
        found[f"early stages of {network.name}"] = _table(*_early(study, network))
    return found


def terminal_tables(study: Study) -> Iterator[Table]:
    for network in study.networks:
        for title, (header, rows) in {
            "costs": _costs(network),
            "images per second": _throughput(study, network),
        }.items():
            columns = [Column(name, justify="right" if i else "left") for i, name in enumerate(header)]
            table = Table(*columns, title=f"{network.name}: {title}", box=box.SIMPLE_HEAD)
            for row in rows:
                table.add_row(*row)
            yield table


Cells = tuple[list[str], list[list[str]]]


def _costs(network: Network) -> Cells:
    rows = []
    for fused in VARIANTS:
        row = [fused, f"{network.parameters[fused] / 1e6:.1f} M", f"{network.multiply_adds[fused] / 1e9:.2f} B"]
        if network.name == "efficientnet_b4":
            parameters, operations, *_ = PAPER[fused]
            row[2:2] = [f"{parameters} M"]
            row += [f"{operations} B"]
        rows.append(row)
    paper = ["", ""] if network.name == "efficientnet_b4" else []
    header = ["fused stages", "parameters", *["paper"] * bool(paper), "multiply-adds", *["paper"] * bool(paper)]
    return header, rows


def _places(study: Study) -> list[tuple[str, Direction, bool]]:
    """Devices and directions, in the order of the runs."""
    return list(dict.fromkeys((run.device, run.direction, run.modelled) for run in study.runs))


def _throughput(study: Study, network: Network) -> Cells:
    """Images per second, and how many times those of eager with no fused stage."""
    rows = []
    if network.name == "efficientnet_b4":
        for column, device in ((3, "V100"), (2, "a TPU core")):
            values = [figures[column] for figures in PAPER.values()]
            rows.append([f"paper: {device}", "its own", *(f"{v} ({v / values[0]:.2f})" for v in values)])
    for device, direction, modelled in _places(study):
        base = study.run(network.name, "none", EAGER, direction, device).images_per_second
        for implementation in IMPLEMENTATIONS:
            runs = [study.run(network.name, fused, implementation, direction, device) for fused in VARIANTS]
            cells = (_rate(run, base) for run in runs)
            kind = "modelled" if modelled else "measured"
            rows.append([f"{device}, {direction}, {kind}", implementation, *cells])
    return ["", "", *VARIANTS], rows


def _rate(run: Run, base: float) -> str:
    rate = run.images_per_second
    spread = "" if run.modelled else f" \u00b1{rate * run.milliseconds.half_range / run.milliseconds.median:.1f}"
    return f"{rate:.0f}{spread} ({rate / base:.2f})" if rate >= 100 else f"{rate:.1f}{spread} ({rate / base:.2f})"


def _stage_ratios(study: Study, network: Network) -> Cells:
    """How many times as long as its Fused-MBConv form each stage takes with MBConv."""
    places = [p for p in _places(study) if p[0] in ("CPU", "A100")]
    header = ["stage"]
    columns = []
    for device, direction, modelled in places:
        for implementation in IMPLEMENTATIONS:
            header.append(f"{device}, {direction}, {'modelled' if modelled else 'measured'}: {implementation}")
            mbconv, fused = (
                study.run(network.name, name, implementation, direction, device).stages for name in ("none", "1-7")
            )
            columns.append([f"{a / b:.2f}" for a, b in zip(mbconv, fused, strict=True)])
    return header, [[str(i + 1), *cells] for i, cells in enumerate(zip(*columns, strict=True))]


def _early(study: Study, network: Network) -> Cells:
    """Microseconds per image of the first three stages, modelled, by kind of work."""
    rows = []
    for device in ("V100", "A100"):
        for direction in get_args(Direction):
            for fused, implementation in (("none", EAGER), ("1-3", EAGER), ("none", OURS), ("1-3", OURS)):
                early = study.run(network.name, fused, implementation, direction, device).early
                block = "Fused-MBConv" if fused == "1-3" else "MBConv"
                kinds = (f"{1000 * early.get(kind, 0):.0f}" for kind in (DEPTHWISE, PRODUCTS, PASSES, FUSIONS))
                total = f"{1000 * sum(early.values()):.0f}"
                rows.append([f"{device}, {direction}", f"{block}, {implementation}", *kinds, total])
    return ["modelled", "", DEPTHWISE, PRODUCTS, PASSES, FUSIONS, "together"], rows


def plot(study: Study) -> bytes:
    """Images per second of each variant, as multiples of eager's with no fused stage."""
    from matplotlib.figure import Figure

    from effkernels.profiling.plots import COLORS

    places = [place for place in _places(study) if place[0] in ("CPU", "A100")]
    figure = Figure(figsize=(13, 3.2 * len(study.networks)), layout="constrained")
    grid = figure.subplots(len(study.networks), len(places) + 1, squeeze=False, sharey="row")
    positions = range(len(VARIANTS))

    def bars(axes: Any, series: dict[str, tuple[str, list[float]]]) -> None:
        for i, (label, (color, values)) in enumerate(series.items()):
            at = [p + 0.4 * i - 0.2 for p in positions]
            axes.bar(at, values, 0.4, color=color, label=label)
            for x, value in zip(at, values, strict=True):
                axes.text(x, value, f"{value:.1f}", ha="center", va="bottom", fontsize=7)

    for network, row in zip(study.networks, grid, strict=True):
        if network.name == "efficientnet_b4":
            shown = {"V100": (3, "#999999"), "a TPU core": (2, "#cccccc")}
            rates = {
                name: (color, [figures[column] / PAPER["none"][column] for figures in PAPER.values()])
                for name, (column, color) in shown.items()
            }
            bars(row[0], rates)
            row[0].set_title("the paper's", fontsize=9)
            row[0].legend(frameon=False, fontsize=8)
        else:
            row[0].set_axis_off()
        for (device, direction, modelled), axes in zip(places, row[1:], strict=True):
            base = study.run(network.name, "none", EAGER, direction, device).images_per_second
            series = {}
            for implementation in IMPLEMENTATIONS:
                runs = [study.run(network.name, fused, implementation, direction, device) for fused in VARIANTS]
                series[implementation] = COLORS[implementation], [run.images_per_second / base for run in runs]
            bars(axes, series)
            axes.axhline(1, color="#333333", linewidth=0.8)
            axes.set_title(f"{direction}, {device}, {'modelled' if modelled else 'measured'}", fontsize=9)
        row[1].legend(frameon=False, fontsize=8)
        first = row[0 if network.name == "efficientnet_b4" else 1]
        first.tick_params(labelleft=True)
        first.set_ylabel(f"{network.name}, {network.resolution}\nimages per second, eager = 1")
        for axes in row:
            axes.set_xticks(positions, VARIANTS)
            axes.set_xlabel("fused stages", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    return file.getvalue()
