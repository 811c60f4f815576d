"""A training step of EfficientNet-B0, fp32, batch 8: its time, what it keeps for backward, its peak memory."""

import concurrent.futures
import multiprocessing
import pathlib
from collections.abc import Callable

import pytest
import suite
import torch
import torch.nn.functional as F
import torchvision
from suite import LAYOUTS
from torch import Tensor, nn

import effkernels
from effkernels.profiling.saved import saved_bytes

SIZE = 224
# How much faster than the best of each.
TARGETS = {"eager": 2.0, "torch.compile": 1.3}


def network(implementation: str, layout: str, memory: str = "default") -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.efficientnet_b0().to(memory_format=LAYOUTS[layout])
    return effkernels.convert(model, memory=memory) if implementation == "effkernels" else model


def step(model: nn.Module, layout: str, batch: int = suite.BATCH, size: int = SIZE) -> Callable[[], Tensor]:
    """A forward and a backward pass that give the loss; images dropped by stochastic depth are the same each time."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    x, labels = x.to(dtype).contiguous(memory_format=LAYOUTS[layout]), torch.arange(batch)

    def run() -> Tensor:
        torch.manual_seed(1)
        model.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        return loss.detach()

    return run


def outcome(model: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """The loss and all gradients of a step."""
    return torch.cat([run()[None], *(p.grad.flatten() for p in model.parameters())])


def variant(implementation: str, layout: str, exact: Tensor) -> Callable[[], Tensor]:
    """A step that is known to be right."""
    model = network(implementation, layout)
    # With the library's random numbers, as everyone else.
    called = torch.compile(model, options={"fallback_random": True}) if implementation == "torch.compile" else model
    run = step(called, layout)
    assert (outcome(model, run) - exact).norm() < 1e-3 * exact.norm()
    return run


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("rival", ["eager", pytest.param("torch.compile", marks=pytest.mark.slow)])
def test_step(benchmark, rival):
    wide = network("eager", "nchw").double()
    exact = outcome(wide, step(wide, "nchw"))
    calls = {f"{name} {layout}": variant(name, layout, exact) for name in (rival, "effkernels") for layout in LAYOUTS}
    suite.compare_with_best(benchmark, calls, "effkernels", TARGETS[rival])


@pytest.mark.benchmark(group="training: bytes kept for backward")
@pytest.mark.parametrize("memory, share", [("default", 0.36), ("minimal", 0.20)])
def test_saved_bytes(benchmark, memory, share):
    def count() -> dict[str, int]:
        found = {}
        for implementation in ("eager", "effkernels"):
            blocks = network(implementation, "nchw", memory).features[1:8]
            x = torch.randn(suite.BATCH, 32, SIZE // 2, SIZE // 2, requires_grad=True)
            with torch.enable_grad():
                found[implementation] = sum(saved_bytes(blocks, x, parameters=blocks.parameters()))
        return found

    found = benchmark.pedantic(count)
    suite.keep_bytes(benchmark, found, at_most=share * found["eager"])


def peak_memory(layout: str, threads: int) -> tuple[int, int]:
    """How much a process grows by one step, and the bound: what is kept, and three of the largest tensor."""
    torch.set_num_threads(threads)
    model = network("effkernels", layout)
    for _ in range(2):
        step(model, layout, 2, 32)()  # next to nothing but what every step takes
    before = _status("VmRSS")
    run = step(model, layout)
    run()
    grown = _status("VmHWM") - before
    kept = saved_bytes(run, parameters=model.parameters())
    return grown, sum(kept) + 3 * max(kept)


def _status(field: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.benchmark(group="training: peak memory")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peak_memory(benchmark, layout):
    context = multiprocessing.get_context("spawn")  # a fresh process
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        grown, bound = benchmark.pedantic(lambda: pool.submit(peak_memory, layout, torch.get_num_threads()).result())
    suite.keep_bytes(benchmark, {"effkernels": grown}, at_most=bound)
