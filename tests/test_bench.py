"""The benchmark suite, and `effkernels bench compare`."""

import json
import pathlib
import subprocess
import sys

import pytest
import suite
import torch
from typer.testing import CliRunner

import effkernels
from effkernels.cli import app

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"

MACHINE = {"device": "a CPU", "threads": "1", "clocks.sm": "1410 MHz"}
STEADY = [1.0, 1.01, 1.02, 1.03, 1.04]


def saved(path, cases, commit="0" * 40, dirty=False, **machine):
    benchmarks = [{"name": name, "extra_info": info} for name, info in cases.items()]
    run = {
        "machine_info": {"effkernels": MACHINE | machine},
        "commit_info": {"id": commit, "dirty": dirty},
        "benchmarks": [*benchmarks, {"name": "of somebody else", "extra_info": {}}],
    }
    path.write_text(json.dumps(run))
    return str(path)


def times(**samples):
    return {"unit": "ms", "samples": samples}


def compare(*arguments):
    result = CliRunner().invoke(app, ["bench", "compare", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_marks_what_exceeds_the_spread_alone(tmp_path):
    before = saved(
        tmp_path / "a.json",
        {
            "test_faster[x]": times(cpp=STEADY, eager=STEADY),
            "test_slower[x]": times(cpp=STEADY),
            "test_noisy[x]": times(cpp=[1.0, 1.0, 2.0, 3.0, 3.0]),
            "test_kept[x]": {"unit": "MiB", "samples": {"cpp": [100.0]}},
            "test_gone[x]": times(cpp=STEADY),
        },
    )
    after = saved(
        tmp_path / "b.json",
        {
            "test_faster[x]": times(cpp=[t / 2 for t in STEADY], eager=[1.01 * t for t in STEADY]),
            "test_slower[x]": times(cpp=[3 * t for t in STEADY]),
            "test_noisy[x]": times(cpp=[1.5, 1.5, 3.0, 4.0, 4.0]),
            "test_kept[x]": {"unit": "MiB", "samples": {"cpp": [99.0]}},
            "test_new[x]": times(cpp=STEADY),
        },
    )
    code, output = compare(before, after)
    assert code == 0, output
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in output.splitlines() if line.strip()}
    assert rows["faster[x]"] == "cpp 1.02 ms 1.01-1.03 0.51 ms 0.505-0.515 0.50 less"
    assert rows["slower[x]"].endswith("3.00 more")
    assert rows["kept[x]"] == "cpp 100 MiB 100-100 99 MiB 99-99 0.99 less"
    assert "noisy[x]" not in output and output.count("faster[x]") == 1
    assert "3 of 5 changed" in output
    assert "Eager PyTorch itself took 1.01 times as long" in output
    assert "only before: gone[x] cpp" in output and "only after: new[x] cpp" in output
    assert "not the same" not in output

    code, output = compare(before, after, "--all")
    noisy = next(line for line in output.splitlines() if "noisy[x]" in line)
    assert code == 0 and noisy.split()[-1] == "1.50"


def test_warns_of_different_machines_and_commits(tmp_path):
    before = saved(tmp_path / "a.json", {"test_it": times(cpp=STEADY)}, **{"clocks.sm": "210 MHz"})
    after = saved(tmp_path / "b.json", {"test_it": times(cpp=STEADY)}, "f" * 40, True, threads="2", driver="580")
    _, output = compare(before, after)
    assert "not the same threads: 1 before, 2 after" in output
    assert "not the same driver: unknown before, 580 after" in output
    assert "not the same commit: 0000000000 before, ffffffffff and uncommitted changes after" in output
    assert "clocks" not in output
    assert "0 of 1 changed" in output


def test_refuses_a_file_without_samples(tmp_path):
    run = saved(tmp_path / "a.json", {"test_it": times(cpp=STEADY)})
    code, output = compare(run, saved(tmp_path / "b.json", {}))
    assert code == 1 and "holds no samples" in output


def test_a_run_of_the_suite_can_be_compared(tmp_path):
    file = str(tmp_path / "run.json")
    chosen = ["--benchmark-only", "-k", "squeeze_excite and 1152-7", "--benchmark-json", file]
    command = [sys.executable, "-m", "pytest", "-q", *chosen, str(BENCHMARKS / "bench_ops.py")]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert printed.returncode == 0, printed.stdout
    assert "squeeze_excite[1152-7-48-step-float32]" in printed.stdout
    recorded = json.loads(pathlib.Path(file).read_text())["machine_info"]["effkernels"]
    assert recorded["torch"] == torch.__version__ and recorded["threads"] == "1"
    code, output = compare(file, file, "--all")
    layouts = 2 * (1 + len(suite.kernels(torch.device("cpu"), torch.float32)))
    assert code == 0 and f"0 of {2 * layouts} changed" in output


class Benchmark:
    """pytest-benchmark's fixture, as much of it as the suite uses."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds):
        for _ in range(rounds):
            function()


CPU = suite.Setting(torch.device("cpu"), everything=False)


@pytest.mark.parametrize("direction, outputs", [("forward", 1), ("backward", 5), ("step", 6)])
def test_implementations_take_turns_once_they_agree(direction, outputs, monkeypatch):
    monkeypatch.setattr(suite, "SECONDS", 0.0)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    calls, exact = suite.contenders(CPU, effkernels.SqueezeExcite(8, 2), x, direction, torch.float32)
    assert len(exact) == outputs and exact[0].dtype == torch.float64
    benchmark = Benchmark()
    suite.compare(benchmark, CPU, calls, exact)
    assert {len(samples) for samples in benchmark.extra_info["samples"].values()} == {suite.ROUNDS[0]}

    right = calls["eager channels_last"]
    calls["eager channels_last"] = lambda: [1.001 * t for t in right()]
    with pytest.raises(AssertionError, match="eager channels_last"):
        suite.compare(benchmark, CPU, calls, exact)
