"""What the benchmarks share: shapes, implementations, and measurement in turns, once their answers agree."""

import copy
import csv
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from make_shapes import SHAPES, Block
from torch import Tensor, nn

import effkernels
from effkernels import backends
from effkernels.ops._cases import FLOOR_ULPS
from effkernels.profiling.timing import milliseconds, stamp

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
BATCH = 8
ROUNDS, SECONDS = (10, 30), 2.0  # how many rounds: as many as take this long, within these
# Errors against float64 may be this many times eager's. The tests are strict; other implementations are not ours.
AGREEMENT = 10
FLUSHED = 256 * 2**20  # bytes that are written to empty a GPU's cache

Call = Callable[[], Sequence[Tensor]]


def blocks(models: Iterable[str]) -> list[Block]:
    """The classes of blocks of these models, each once."""
    found: dict[Block, None] = {}
    for model in models:
        with (SHAPES / f"{model}.csv").open(newline="") as file:
            for kind, *numbers in list(csv.reader(file))[1:]:
                found[Block(kind, *map(int, numbers[:-1]))] = None
    return list(found)


class Setting(NamedTuple):
    """Where benchmarks run, and whether with every implementation."""

    device: torch.device
    everything: bool


def kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    x = torch.empty(1, device=device, dtype=dtype)
    return [name for name in backends.PREFERENCE if name != "eager" and not backends.why_not(name, x)]


def is_ours(implementation: str) -> bool:
    return implementation.split()[0] in backends.DEVICES


def contenders(
    setting: Setting, module: nn.Module, x: Tensor, direction: str, dtype: torch.dtype
) -> tuple[dict[str, Call], Sequence[Tensor]]:
    """Calls of every implementation of `module` in every layout, by name, and what they return in float64.

    A direction is "forward" (inference), "backward" or "step" (a forward and a backward pass in training).
    """

    def call(backend: str, prepare: Callable[[nn.Module], nn.Module], layout: str, dtype: torch.dtype) -> Call:
        form: dict[str, Any] = dict(device=setting.device, dtype=dtype, memory_format=LAYOUTS[layout])
        prepared = prepare(copy.deepcopy(module).to(**form).train(direction != "forward"))
        with effkernels.use_backend(backend):
            run = _directed(direction, prepared, x.detach().to(**form).requires_grad_(x.requires_grad))
        return on(backend, run)

    def compiled(module: nn.Module) -> nn.Module:
        options = {"freezing": True} if direction == "forward" else {"fallback_random": True}
        compiled: nn.Module = torch.compile(_plain(module), dynamic=False, options=options)
        return compiled

    torch.compiler.reset()  # else all cases share one limit of recompilations
    forms: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {"eager": ("eager", _plain)}
    if setting.everything:
        forms["torch.compile"] = ("eager", compiled)
    forms |= {backend: (backend, effkernels.convert) for backend in kernels(setting.device, dtype)}
    calls = {f"{name} {layout}": call(*form, layout, dtype) for name, form in forms.items() for layout in LAYOUTS}
    return calls, call("eager", _plain, "nchw", torch.float64)()


def _plain(module: nn.Module) -> nn.Module:
    """With activations in place, as the libraries have them."""
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = True
    return module


def _directed(direction: str, module: nn.Module, x: Tensor) -> Call:
    if direction == "forward":
        return torch.no_grad()(lambda: [module(x)])

    def forward() -> Tensor:
        torch.manual_seed(1)  # images dropped by stochastic depth are the same each time
        y: Tensor = module(x)
        return y

    y = forward()
    leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    if direction == "backward":
        return lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True)
    return lambda: [y := forward(), *torch.autograd.grad(y, leaves, gradient)]


def on(backend: str, call: Call) -> Call:
    def run() -> Sequence[Tensor]:
        with effkernels.use_backend(backend):
            return call()

    return run


def compare(benchmark: Any, setting: Setting, calls: dict[str, Call], exact: Sequence[Tensor]) -> None:
    """Time `calls` in turns, one of each per round, and keep every sample.

    What disturbs the machine for longer than a round disturbs all of them.

    Raises:
        AssertionError: one is further from `exact` than `AGREEMENT` allows.
    """
    _assert_agreement(calls, exact)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    timer = _timer(setting.device)

    def one_round() -> None:
        for name, call in calls.items():
            samples[name].append(timer(call))

    start = time.perf_counter()
    one_round()  # warms up
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(one_round, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))
    keep(benchmark, setting, "ms", {name: values[1:] for name, values in samples.items()})


def keep(benchmark: Any, setting: Setting, unit: str, samples: dict[str, list[float]]) -> None:
    """Keep what each implementation takes, in one list for all kinds of benchmarks."""
    rounded = {name: [round(value, 4) for value in values] for name, values in samples.items()}
    benchmark.extra_info.update(unit=unit, samples=rounded, gpu=gpu_state(setting.device))


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver and clocks as nvidia-smi tells them; empty where there is none."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    index = torch.cuda.current_device() if device.index is None else device.index
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(fields, map(str.strip, printed.split(",")), strict=True))


def _assert_agreement(calls: dict[str, Call], exact: Sequence[Tensor]) -> None:
    expected = _flat(exact)
    outputs = {name: call() for name, call in calls.items()}
    errors = {name: float((_flat(got) - expected).norm() / expected.norm()) for name, got in outputs.items()}
    eager = next(name for name in calls if name.startswith("eager"))
    allowed = AGREEMENT * errors[eager] + FLOOR_ULPS * torch.finfo(outputs[eager][0].dtype).eps
    # Eager's other layout adds up in another order, which alone can differ by more than that: not so ours.
    wrong = {
        name: error for name, error in errors.items() if not error <= allowed * (AGREEMENT if "eager" in name else 1)
    }
    assert not wrong, f"relative errors against float64 {wrong}, allowed {allowed:.1e}"


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().cpu().double().flatten() for t in tensors])


def _timer(device: torch.device) -> Callable[[Call], float]:
    """Of the milliseconds of a call: on a GPU, with an empty cache, whose emptying outlasts the launch of the call."""
    flushed = torch.empty(FLUSHED, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def timed(call: Call) -> float:
        if flushed is not None:
            flushed.zero_()
        start = stamp(device)
        call()
        end = stamp(device)
        if flushed is not None:
            end.synchronize()
        return milliseconds(start, end)

    return timed
