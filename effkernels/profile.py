"""`effkernels profile`: any network, eager against converted, measured here or modelled for a GPU."""

import difflib
import importlib
import pathlib
from collections.abc import Iterable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUT = pathlib.Path("effkernels-report")

Image = Annotated[
    pathlib.Path | None, typer.Option(exists=True, dir_okay=False, help="A photograph; default: a portrait.")
]
Out = Annotated[pathlib.Path, typer.Option(help="The folder to write the report to.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's choice.")]


def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="A model of torchvision, timm (timm:NAME) or effkernels (effkernels:NAME), or module:function."
        ),
    ],
    image: Image = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, or model:GPU, such as model:H100; default: cuda if there is a GPU.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"Of weights and images: {', '.join(DTYPES)}.")] = "float32",
    train: Annotated[bool, typer.Option("--train", help="A training step: forward and backward.")] = False,
    out: Out = OUT,
    threads: Threads = None,
) -> None:
    """What each block of a network costs, eager and converted: time, bytes, operations, memory."""
    _one_of("dtype", dtype, DTYPES)
    run(model, image, device or default_device(), batch, DTYPES[dtype], train, out, threads)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def require(console: Console, *packages: str) -> None:
    """Leave, saying what to install, if one of these packages of the extra `demo` is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as missing:
            console.print(f'{missing.name} is not installed: pip install "effkernels\\[demo]"', style="red")
            raise typer.Exit(1) from None


def run(
    model: str,
    image: pathlib.Path | None,
    device: str,
    batch: int,
    dtype: torch.dtype,
    train: bool,
    out: pathlib.Path,
    threads: int | None,
) -> None:
    """Write a report to `out` and show its tables."""
    console = Console()
    require(console, "jinja2", "matplotlib", "torchvision")
    from effkernels.profiling import measure
    from effkernels.profiling.find import UnknownModel
    from effkernels.profiling.gpus import GPUS

    gpus = {f"model:{name}": gpu for name, gpu in GPUS.items()}
    _one_of("device", device, ["cpu", "cuda", *gpus])
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"no GPU was found; accepted are cpu, {', '.join(gpus)}", param_hint="--device")
    if device in gpus and image is not None:
        raise typer.BadParameter("nothing is computed on a modelled device, got an image", param_hint="--image")
    if threads:
        torch.set_num_threads(threads)
    try:
        request = measure.Request(measure.networks_of(model), batch, dtype, train, image)
    except UnknownModel as unknown:
        raise typer.BadParameter(str(unknown), param_hint="MODEL") from None
    if device in gpus:
        try:
            gpus[device].ceilings(dtype)
        except ValueError as unknown:
            raise typer.BadParameter(str(unknown), param_hint="--dtype") from None
    with Progress(console=console, transient=True) as progress:
        steps = progress.add_task(model, total=measure.REPEATS + measure.STAGES)
        if device in gpus:
            report = measure.model_on(gpus[device], request)
        else:
            report = measure.measure(torch.device(device), request, lambda: progress.advance(steps))
        report.write(out)
    console.print(report.tables())
    console.print(f"{report.conditions}.\n[bold]{report.summary}. See {out / 'index.html'}")


def _one_of(option: str, value: str, accepted: Iterable[str]) -> None:
    accepted = list(accepted)
    if value not in accepted:
        close = "".join(f"; close to it: {name}" for name in difflib.get_close_matches(value, accepted, n=1))
        raise typer.BadParameter(
            f"must be one of {', '.join(accepted)}, got {value!r}{close}", param_hint=f"--{option}"
        )
