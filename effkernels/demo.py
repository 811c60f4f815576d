"""`effkernels demo`: EfficientNet-B0 on a photograph, eager against converted, block by block."""

import copy
import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import effkernels

if TYPE_CHECKING:
    from effkernels.profiling.report import Report

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
REPEATS, SECONDS = 25, 25.0  # whichever ends first


def demo(
    image: Annotated[
        pathlib.Path | None, typer.Option(exists=True, dir_okay=False, help="A photograph; default: a portrait.")
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="The folder to write the report to.")] = pathlib.Path(
        "effkernels-report"
    ),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's choice.")] = None,
) -> None:
    """Run EfficientNet-B0 eager and converted: the same answers, and what each block costs."""
    console = Console()
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
        import torchvision  # noqa: F401
    except ImportError as missing:
        console.print(f'demo: {missing.name} is not installed: pip install "effkernels\\[demo]"', style="red")
        raise typer.Exit(1) from None
    if threads:
        torch.set_num_threads(threads)
    with Progress(console=console, transient=True) as progress:
        report = measure(image or _portrait(), progress)
        report.write(out)
    console.print(report.table())
    console.print(
        f"Same answers: relative error against float64 {report.runs['eager'].error:.1e} eager, "
        f"{report.runs['effkernels'].error:.1e} effkernels.\n"
        f"{report.conditions}.\n"
        f"[bold]{report.speedup:.2f}x faster, {report.fewer_bytes:.2f}x fewer bytes. See {out / 'index.html'}"
    )


def measure(image: pathlib.Path, progress: Progress, repeats: int = REPEATS) -> "Report":
    """Run both networks on crops of `image`.

    Raises:
        RuntimeError: the outputs disagree.
    """
    from torchvision.models import efficientnet_b0

    from effkernels.profiling import Workload, record, time_blocks
    from effkernels.profiling.report import EAGER, FUSED, Report, Run, machine
    from effkernels.profiling.timing import STEP

    steps = progress.add_task("EfficientNet-B0", total=repeats + 3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = _crops(image).to(device)
    torch.manual_seed(0)
    eager = efficientnet_b0().to(device)
    # Nothing is downloaded: weights are random, and with statistics of the photograph activations keep their scale.
    torch.optim.swa_utils.update_bn([images], eager)
    eager.eval()
    progress.advance(steps)
    fused = effkernels.convert(copy.deepcopy(eager))
    blocks = [entry.name for entry in effkernels.conversion_report(fused).entries]
    networks = {EAGER: eager, FUSED: fused}

    with torch.no_grad():
        exact = copy.deepcopy(eager).double()(images.double())
        errors = {name: float((net(images) - exact).norm() / exact.norm()) for name, net in networks.items()}
    allowed = 2 * errors[EAGER] + 4 * torch.finfo(images.dtype).eps
    if not errors[FUSED] <= allowed:
        raise RuntimeError(
            f"the outputs disagree: relative error {errors[FUSED]:.1e} against float64, allowed {allowed:.1e}"
        )
    progress.advance(steps)

    variants: dict[Any, Workload] = {}
    for name, network in networks.items():
        for layout, memory_format in LAYOUTS.items():
            model = copy.deepcopy(network).to(memory_format=memory_format)
            variants[name, layout] = Workload(model, images.contiguous(memory_format=memory_format))
    found = time_blocks(variants, blocks, repeats=repeats, seconds=SECONDS, on_repeat=lambda: progress.advance(steps))
    times = {key: phases[STEP] for key, phases in found.items()}

    runs = {}
    for name in networks:
        totals = {layout: times[name, layout].pop("") for layout in LAYOUTS}
        best, other = sorted(LAYOUTS, key=lambda layout: totals[layout].median)
        bytes_of = dict.fromkeys(blocks, 0)
        for launch in record(variants[name, best], blocks).launches:
            if launch.block:
                bytes_of[launch.block] += launch.bytes
        runs[name] = Run(best, totals[other].median, totals[best], times[name, best], bytes_of, errors[name])
    progress.update(steps, completed=repeats + 3)
    n, _, h, w = images.shape
    return Report(
        model="torchvision efficientnet_b0",
        image=image.name,
        input=f"{n} images of {h}x{w}, float32",
        runs=runs,
        machine=machine(device),
    )


def _portrait() -> pathlib.Path:
    from matplotlib import get_data_path

    return pathlib.Path(get_data_path(), "sample_data", "grace_hopper.jpg")


def _crops(image: pathlib.Path) -> torch.Tensor:
    """[8, 3, 224, 224]: the corners of the photograph and their mirror images."""
    from PIL import Image
    from torchvision.transforms import functional as transforms

    photograph = transforms.resize(Image.open(image).convert("RGB"), [256])
    corners = torch.stack([transforms.to_tensor(crop) for crop in transforms.five_crop(photograph, [224])[:4]])
    batch = torch.cat([corners, corners.flip(3)])
    return transforms.normalize(batch, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
