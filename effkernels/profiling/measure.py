"""Eager beside effkernels, measured on this machine or modelled for a GPU."""

import copy
import pathlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import effkernels
from effkernels import backends
from effkernels.nn.fusion import Fused
from effkernels.profiling.ceilings import measure_ceilings
from effkernels.profiling.find import find_model
from effkernels.profiling.gpus import GPU
from effkernels.profiling.images import crops
from effkernels.profiling.kernels import time_kernels
from effkernels.profiling.launches import Launch, record
from effkernels.profiling.memory import peak_bytes
from effkernels.profiling.meta import GPU_BACKEND, as_on_gpu, on_meta
from effkernels.profiling.report import EAGER, FUSED, Report, Run, machine
from effkernels.profiling.saved import saved_bytes
from effkernels.profiling.timing import OUTSIDE, STEP, TOTAL, Spread, Times, time_blocks
from effkernels.profiling.workload import Workload

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
REPEATS, SECONDS = 25, 25.0  # whichever ends first
RECORDS = 3  # of which each launch's time is the median
STAGES = 6  # beside the repeats


@dataclass(frozen=True)
class Networks:
    """A model as it is and, if anything in it can be fused, converted; and the size of its images."""

    name: str
    by_run: dict[str, nn.Module]
    size: int

    @property
    def blocks(self) -> list[str]:
        """The parts that have costs of their own: those of `conversion_report`, or the model's children."""
        model = [*self.by_run.values()][-1]
        if FUSED in self.by_run:
            return [entry.name for entry in effkernels.conversion_report(model).entries]
        return [name for name, _ in model.named_children()]


def networks_of(name: str) -> Networks:
    """Raises UnknownModel if there is none of this name."""
    torch.manual_seed(0)
    eager, size = find_model(name)
    if isinstance(eager, Fused) or not [*eager.children()]:
        eager = nn.Sequential(eager)  # a block alone is the block of a model
    found = {EAGER: eager}
    with suppress(ValueError):  # nothing to convert
        found[FUSED] = effkernels.convert(copy.deepcopy(eager))
    return Networks(name, found, size)


@dataclass(frozen=True)
class Request:
    """What to profile."""

    networks: Networks
    batch: int = 8
    dtype: torch.dtype = torch.float32
    train: bool = False
    image: pathlib.Path | None = None  # its crops are the input on a real device; None: those of a portrait

    @property
    def input(self) -> str:
        size = self.networks.size
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        return f"{images} of {size}x{size}, {str(self.dtype).removeprefix('torch.')}"


def model_on(gpu: GPU, request: Request) -> Report:
    """What the data sheet of a GPU allows, from what would be launched there."""
    ceilings, blocks = gpu.ceilings(request.dtype), request.networks.blocks
    runs = {}
    for name, network in request.networks.by_run.items():
        backend = "eager" if name == EAGER else GPU_BACKEND
        shape = (request.batch, 3, request.networks.size, request.networks.size)
        with as_on_gpu():
            workload = on_meta(network, shape, request.dtype, train=request.train, backend=backend)
            launches, peak = record(workload, blocks)
            kept = _kept(workload)
        launches = [replace(launch, milliseconds=1000 * ceilings.seconds([launch])) for launch in launches]
        runs[name] = Run(backend, "any", None, _summed(launches, blocks), launches, [], kept, peak, None)
    return Report(
        model=request.networks.name,
        image=None,
        input=request.input,
        train=request.train,
        modelled=True,
        blocks=_that_run(blocks, runs[EAGER].launches),
        ceilings=ceilings,
        runs=runs,
        machine={"device": gpu.name, **machine(None)},
    )


def _summed(launches: Sequence[Launch], blocks: Sequence[str]) -> Times:
    names = (*blocks, OUTSIDE, TOTAL)
    times: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(names, 0.0))
    for launch in launches:
        for phase in (launch.phase, STEP):
            for name in (launch.block or OUTSIDE, TOTAL):
                times[phase][name] += launch.milliseconds
    return {phase: {name: Spread(ms, ms, ms) for name, ms in names.items()} for phase, names in times.items()}


def measure(device: torch.device, request: Request, advance: Callable[[], None] = lambda: None) -> Report:
    """Time the network on a photograph; `advance` is called REPEATS + STAGES times at most.

    Raises:
        RuntimeError: eager and effkernels disagree.
    """
    networks, size = request.networks.by_run, request.networks.size
    images = crops(request.image, size, request.batch)
    # Nothing is downloaded: weights are random, and with statistics of the photograph activations keep their scale.
    torch.optim.swa_utils.update_bn([images], networks[EAGER])
    for network in networks.values():
        network.load_state_dict(networks[EAGER].state_dict())
        network.to(device, request.dtype)
    images = images.to(device, request.dtype)
    advance()
    errors = _errors(networks, images, request.train)
    advance()

    variants: dict[Any, Workload] = {}
    for name, network in networks.items():
        for layout, memory_format in LAYOUTS.items():
            model = copy.deepcopy(network).to(memory_format=memory_format)
            x = images.contiguous(memory_format=memory_format)
            variants[name, layout] = Workload(model, x, request.train, _backend(name, images))
    blocks = request.networks.blocks
    blocks = _that_run(blocks, record(variants[EAGER, "NCHW"], blocks).launches)
    times = time_blocks(variants, blocks, repeats=REPEATS, seconds=SECONDS, on_repeat=advance)
    ceilings = measure_ceilings(device, request.dtype)
    advance()

    runs = {}
    for name in networks:
        totals = {layout: times[name, layout][STEP][TOTAL].median for layout in LAYOUTS}
        best, other = sorted(LAYOUTS, key=totals.__getitem__)
        workload = variants[name, best]
        arguments: dict[str, Any] = {
            "model": request.networks.name, "fused": name == FUSED, "layout": best, "batch": request.batch,
            "size": size, "dtype": str(request.dtype).removeprefix("torch."), "train": request.train,
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        runs[name] = Run(
            backend=_backend(name, images),
            layout=best,
            other_layout_ms=totals[other],
            times=times[name, best],
            launches=_timed(workload, blocks),
            kernels=time_kernels(workload)[:20],
            saved_bytes=_kept(workload),
            peak_bytes=peak_bytes(workload, arguments),
            error=errors.get(name),
        )
        advance()
    return Report(
        model=request.networks.name,
        image=request.image.name if request.image else "a portrait that comes with matplotlib",
        input=request.input,
        train=request.train,
        modelled=False,
        blocks=blocks,
        ceilings=ceilings,
        runs=runs,
        machine=machine(device),
    )


def prepare(
    model: str, fused: bool, layout: str, batch: int, size: int, dtype: str, train: bool, threads: int
) -> Workload:
    """One of the workloads on the CPU, for a process of its own."""
    torch.set_num_threads(threads)
    name = FUSED if fused else EAGER
    network = networks_of(model).by_run[name].to(getattr(torch, dtype)).to(memory_format=LAYOUTS[layout])
    x = torch.randn(batch, 3, size, size).to(getattr(torch, dtype)).contiguous(memory_format=LAYOUTS[layout])
    return Workload(network, x, train, _backend(name, x))


def _backend(name: str, x: Tensor) -> str:
    """By name: `auto` leaves training on a GPU to eager PyTorch."""
    return "eager" if name == EAGER else next(b for b in backends.PREFERENCE if backends.why_not(b, x) is None)


def _that_run(blocks: Sequence[str], launches: Sequence[Launch]) -> list[str]:
    running = {launch.block for launch in launches}
    return [block for block in blocks if block in running]


def _timed(workload: Workload, blocks: Sequence[str]) -> list[Launch]:
    """The launches of a run, each with the median of its times in several."""
    recordings = [record(workload, blocks).launches for _ in range(RECORDS)]
    return [
        replace(same[0], milliseconds=sorted(launch.milliseconds for launch in same)[RECORDS // 2])
        for same in zip(*recordings, strict=True)
    ]


def _kept(workload: Workload) -> int | None:
    """What a step keeps for backward beside the parameters."""
    return sum(saved_bytes(workload.run, parameters=workload.model.parameters())) if workload.train else None


def _errors(networks: dict[str, nn.Module], images: Tensor, train: bool) -> dict[str, float]:
    """The relative errors against float64: of the outputs, and in training of all gradients too."""
    if FUSED not in networks:
        return {}

    def answers(name: str, dtype: torch.dtype) -> Tensor:
        network, x = copy.deepcopy(networks[name]).to(dtype), images.to(dtype)
        workload = Workload(network, x, train, _backend(name, x), drop=False)
        outputs = workload.run()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        return torch.cat([t.detach().double().flatten() for t in (*outputs, *gradients)])

    exact = answers(EAGER, torch.float64)
    errors = {name: float((answers(name, images.dtype) - exact).norm() / exact.norm()) for name in networks}
    allowed = 2 * errors[EAGER] + 4 * torch.finfo(images.dtype).eps
    if not errors[FUSED] <= allowed:
        raise RuntimeError(
            f"the outputs disagree: relative error {errors[FUSED]:.1e} against float64, allowed {allowed:.1e}"
        )
    return errors
