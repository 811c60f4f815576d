"""Threads, what is recorded with a run, and the table of ratios at its end."""

import pytest
import torch

OTHER_LAYOUT_TARGET = 0.8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark-threads", type=int, default=1, help="CPU threads that PyTorch uses in benchmarks")


@pytest.fixture(autouse=True)
def threads_and_inference(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--benchmark-threads"))
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    from effkernels.profiling.report import machine

    machine_info["effkernels"] = machine(torch.device("cpu")) | {
        "threads": str(config.getoption("--benchmark-threads")),
    }


def pytest_terminal_summary(terminalreporter, config) -> None:
    session = getattr(config, "_benchmarksession", None)
    _write_models(terminalreporter, config, session.benchmarks if session else [])
    _write_memory(terminalreporter, session.benchmarks if session else [])
    compared = [b for b in session.benchmarks if "faster" in b.extra_info] if session else []
    if not compared:
        return
    threads = config.getoption("--benchmark-threads")
    write = terminalreporter.write_line
    terminalreporter.section(f"effkernels against eager in the same run, {threads} thread(s)")
    header = ("", "eager, ms", "effkernels, ms", "faster", "quartiles", "target", "other layout", "target")
    rows = [header, *(_row(b.name.removeprefix("test_"), b.extra_info) for b in compared)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        write("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))
    write("Medians over rounds in which each variant runs once; effkernels and eager each in their better layout;")
    write("`other layout` is effkernels' speed in its other layout, as a fraction of that in its better one.")


def _write_models(terminalreporter, config, benchmarks) -> None:
    found = [b for b in benchmarks if "against_best" in b.extra_info]
    if not found:
        return
    threads = config.getoption("--benchmark-threads")
    terminalreporter.section(f"whole models: medians of calls in turns, ms, {threads} thread(s)")
    for benchmark in found:
        info = benchmark.extra_info
        times = ", ".join(f"{name} {value:.1f}" for name, value in info["milliseconds"].items())
        ratios = ", ".join(f"{name} {median:.2f}x" for name, (_, median, _) in info["against_best"].items())
        terminalreporter.write_line(f"{benchmark.name.removeprefix('test_')}: {times}")
        terminalreporter.write_line(f"    against {info['best']}: {ratios} (target {info['target']}x)")


def _write_memory(terminalreporter, benchmarks) -> None:
    found = [b for b in benchmarks if "mebibytes" in b.extra_info]
    if not found:
        return
    terminalreporter.section("memory, MiB")
    for benchmark in found:
        info = benchmark.extra_info
        amounts = ", ".join(f"{name} {value:.1f}" for name, value in info["mebibytes"].items())
        name = benchmark.name.removeprefix("test_")
        terminalreporter.write_line(f"{name}: {amounts} (target: at most {info['at_most']:.1f})")


def _row(name: str, info: dict) -> tuple[str, ...]:
    low, faster, high = info["faster"]
    layouts = {"eager": info["eager_layout"], info["backend"]: info["layout"]}
    times = [f"{info['milliseconds'][f'{run} {layout}']:.3f} {layout}" for run, layout in layouts.items()]
    targets = (f"{info['target']}x", f"{OTHER_LAYOUT_TARGET}x") if info["target"] else ("", "")
    spread = f"{low:.2f}-{high:.2f}x"
    return name, *times, f"{faster:.2f}x", spread, targets[0], f"{info['other_layout'][1]:.2f}x", targets[1]
