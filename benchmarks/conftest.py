"""Options, the parameters of the cases, what is recorded with a run, and the table at its end."""

import importlib.metadata
import math
import statistics

import pytest
import suite
import torch
import torch._functorch.config

from effkernels.models import list_models

MODELS = {"efficientnet_b0": 224, "efficientnet_b4": 380, "efficientnet_v2_s": 300}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effkernels")
    group.addoption("--benchmark-threads", type=int, default=1, help="CPU threads that PyTorch uses in benchmarks")
    group.addoption(
        "--benchmark-device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="cpu or cuda; default: cuda where there is one",
    )
    group.addoption(
        "--benchmark-all",
        action="store_true",
        help="all models' shapes, directions and dtypes, and torch.compile: hours. Default: EfficientNet-B0 and the "
        "fused blocks of V2-S, forward and step, float32 (on a GPU float16)",
    )


def parameters(everything: bool, device: torch.device) -> dict[str, list]:
    """The values of each parameter, by its name in the tests."""
    blocks = suite.blocks(list_models() if everything else ["efficientnet_b0"])
    hidden = [(b.in_channels * b.expand_ratio, b) for b in blocks if b.kind == "mbconv"]
    if not everything:
        blocks += [b for b in suite.blocks(["efficientnet_v2_s"]) if b.kind == "fused"]
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    default = [torch.float32 if device.type == "cpu" else torch.float16]
    return {
        "block": blocks,
        "depthwise": unique((channels, b.size, b.kernel_size, b.stride) for channels, b in hidden),
        "squeeze_excite": unique((channels, math.ceil(b.size / b.stride), b.se_channels) for channels, b in hidden),
        "model": [*MODELS.items()] if everything else [("efficientnet_b0", 224)],
        "batch": [1, 8],
        "direction": ["forward", "step", "backward"] if everything else ["forward", "step"],
        "dtype": dtypes if everything else default,
        "inference_dtype": dtypes if everything else [*default, torch.bfloat16],
        "layout": [*suite.LAYOUTS],
    }


def unique(values) -> list:
    return list(dict.fromkeys(values))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    for name, values in parameters(option("--benchmark-all"), option("--benchmark-device")).items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=_id)


def _id(value: object) -> str:
    if isinstance(value, tuple) and not isinstance(value, suite.Block):
        return "-".join(map(str, value))
    return str(value).removeprefix("torch.")


@pytest.fixture
def setting(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--benchmark-threads"))
    torch.manual_seed(0)
    # A backward pass is repeated.
    with torch._functorch.config.patch(donated_buffer=False):
        yield suite.Setting(request.config.getoption("--benchmark-device"), request.config.getoption("--benchmark-all"))
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    from effkernels.profiling.report import machine

    device = config.getoption("--benchmark-device")
    machine_info["effkernels"] = {
        **machine(device),
        "threads": str(config.getoption("--benchmark-threads")),
        "CUDA": str(torch.version.cuda),
        **{name: _version(name) for name in ("triton", "onnxruntime", "openvino")},
        **suite.gpu_state(device),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def pytest_benchmark_group_stats(config, benchmarks, group_by) -> list:
    return []  # pytest-benchmark's own table would be of whole rounds


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # as above


def pytest_terminal_summary(terminalreporter, config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [_row(b.name.removeprefix("test_"), b.extra_info) for b in session.benchmarks] if session else []
    if not rows:
        return
    device, threads = config.getoption("--benchmark-device"), config.getoption("--benchmark-threads")
    terminalreporter.section(f"effkernels against the best other in the same run, {device}, {threads} CPU thread(s)")
    rows.insert(0, ("", "best other", "", "best of effkernels", "", "ratio", "quartiles"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (c.ljust(w) if i in (0, 1, 3) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        terminalreporter.write_line("  ".join(cells).rstrip())
    terminalreporter.write_line("Medians over rounds in which each implementation runs once, and ratios within rounds.")


def _row(name: str, info: dict) -> tuple[str, ...]:
    samples = info["samples"]
    cells: list[str] = []
    best = [_best(samples, ours) for ours in (False, True)]
    for found in best:
        cells += ["", ""] if found is None else [found, f"{statistics.median(samples[found]):.3f} {info['unit']}"]
    if None in best:
        return name, *cells, "", ""
    ratios = [a / b for a, b in zip(*(samples[found] for found in best), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return name, *cells, f"{middle:.2f}x", f"{low:.2f}-{high:.2f}x"


def _best(samples: dict[str, list[float]], ours: bool) -> str | None:
    names = [name for name in samples if suite.is_ours(name) == ours]
    return min(names, key=lambda name: statistics.median(samples[name]), default=None)
