"""`effkernels doctor`: what this machine can run, and why not the rest."""

import importlib.metadata
import platform
import sys
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

import effkernels
from effkernels import _build, _native, backends
from effkernels.verify import Verdict, device_name, save

YES, NO = Text("yes", "green"), Text("no", "yellow")


def doctor(
    verify: Annotated[
        bool, typer.Option("--verify", help="Run every kernel that this machine can run against float64.")
    ] = False,
) -> None:
    """Say what this machine can run, and why not the rest."""
    console = Console()
    console.print(_facts("This machine", _machine()))
    console.print(_facts("This build", _built()))
    table = Table(
        "Backend", "Runs", Column("Why not, or on what", overflow="fold"), title="Backends", title_justify="left"
    )
    for backend in backends.PREFERENCE:
        reason = _why_not(backend)
        table.add_row(backend, NO if reason else YES, reason or _runs_on(backend))
    console.print(table)
    if verify and not _verify(console):
        raise typer.Exit(1)


def _verify(console: Console) -> bool:
    """Whether every kernel was right; on a GPU `auto` goes by it from now on."""
    from effkernels.ops._cases import cases_for

    table = Table("Backend", "Device", "Kernel", "Cases", Column("Right", overflow="fold"))
    table.title, table.title_justify = "Kernels against float64", "left"
    right = True
    for backend, device in _places():
        verdict = Verdict()
        # Instances that Triton would have to compile are left to the tests.
        tags = ["core"] if backend == "triton" else ["core", "instance"]
        for case in track(cases_for(backend, *tags), f"{backend} on {device}", console=console, transient=True):
            verdict.add(backend, device, case)
        if backend in backends.VERIFIED:
            save(backend, device, verdict)
        for op, count in verdict.cases.items():
            wrong = verdict.wrong.get(op)
            table.add_row(backend, device_name(device), op, str(count), Text(wrong, "red") if wrong else YES)
        right = right and not verdict.wrong
    console.print(table)
    return right


def _places() -> list[tuple[str, str]]:
    """Backends and devices on which they run here."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [
        (backend, device)
        for backend, kinds in backends.DEVICES.items()
        if _native.MISSING[backend] is None
        for device in ["cpu", *gpus]
        if device.split(":")[0] in kinds
    ]


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table("", Column(overflow="fold"), title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _machine() -> dict[str, str]:
    nvcc, cxx = _build.find_nvcc(), _build.find_cxx()
    return {
        "effkernels": effkernels.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        "triton": _version("triton"),
        "C++ compiler": cxx or "none",
        "nvcc": f"{_build.nvcc_release(nvcc)} ({nvcc})" if nvcc else "none",
        "GPU": ", ".join(map(_gpu, range(torch.cuda.device_count()))) or "none that torch can use",
        "CPU": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _built() -> dict[str, str]:
    facts = {f"{name} library": reason or "built" for name, reason in _native.BUILD.missing.items()}
    if _native.introspection:
        info = _native.introspection.build_info()
        facts |= {
            "compiled by": info["compiler"],
            "CPU instruction sets": f"{', '.join(info['cpu_isas'])}; in use: {_native.introspection.cpu_isa()}",
            "CUDA architectures": ", ".join(info["cuda_arches"]) or "none",
        }
    if _native.BUILD.folder:
        facts["build folder"] = str(_native.BUILD.folder)
        log = (_native.BUILD.folder / "build.log").read_text()
        errors = dict.fromkeys(line for line in log.splitlines() if "error:" in line)
        facts["compiler errors"] = "\n".join([*errors][:5]) or "none"
    return facts


def _why_not(backend: str) -> str | None:
    if backend == "eager":
        return None
    if _native.MISSING[backend] is None and backends.DEVICES[backend] == ("cuda",) and not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use"
    return _native.MISSING[backend]


def _runs_on(backend: str) -> str:
    return f"{' and '.join(backends.DEVICES.get(backend, ('any',)))} tensors"


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
