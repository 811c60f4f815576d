"""`effkernels profile`, and what it writes."""

import base64
import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import effkernels
from effkernels import _native
from effkernels.cli import app
from effkernels.profiling import GPUS, measure
from effkernels.profiling.passes import lanes_of, names_of, passes_of

SMALL = "profiling.networks:small"
PICTURES = ("blocks", "kinds", "roofline", "passes")


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr("effkernels.profiling.ceilings.COPY_BYTES", 1 << 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def profile(folder, *arguments):
    result = CliRunner().invoke(app, ["profile", *arguments, "--out", str(folder)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.output, json.loads((folder / "report.json").read_text())


def refused(*arguments):
    result = CliRunner().invoke(app, ["profile", *arguments], env={"COLUMNS": "1000"})
    assert result.exit_code == 2, result.output
    return result.output


def check_files(folder):
    page = (folder / "index.html").read_text()
    for name in PICTURES:
        picture = (folder / f"{name}.png").read_bytes()
        Image.open(io.BytesIO(picture)).verify()
        assert base64.b64encode(picture).decode() in page


@pytest.mark.parametrize("train", [False, True])
def test_measured_on_the_cpu(tmp_path, train):
    output, report = profile(tmp_path, SMALL, "--device", "cpu", "--batch", "2", *["--train"] * train)
    check_files(tmp_path)
    assert "whole network" in output and "the longest kernels" in output and "\u2026" not in output.split("longest")[0]
    assert report["times"] == "measured"
    assert report["input"] == "2 images of 224x224, float32"
    assert report["ceilings, per second"]["bandwidth"] > 0
    assert report["machine"]["torch"] == torch.__version__
    for name, run in report["runs"].items():
        blocks, total = run["blocks"], run["total"]
        assert [*blocks] == ["0", "1", "2", "5", "(outside)"]
        for cost in ("bytes", "operations", "launches"):
            assert sum(block[cost] for block in blocks.values()) == total[cost]
            assert sum(op[cost] for op in run["ops"]) == total[cost]
        phases = {"forward", "backward", "step"} if train else {"forward", "step"}
        assert total["milliseconds"].keys() == phases
        for block in blocks.values():
            assert block["milliseconds"].keys() == phases
            assert block["share of the ceilings"] > 0
        assert (run["saved_bytes"] is not None) == train
        assert run["peak_bytes"] is None or run["peak_bytes"] > 0
        assert run["error"] < 1e-4
        assert any(kernel["name"].startswith(("aten::", "effkernels::")) for kernel in run["kernels"]), name
    eager, fused = report["runs"]["eager"], report["runs"]["effkernels"]
    if not _native.MISSING["cpp"]:
        assert fused["total"]["bytes"] < eager["total"]["bytes"]
        assert not train or fused["saved_bytes"] < eager["saved_bytes"]


@pytest.mark.parametrize("train", [False, True])
def test_modelled_for_a_gpu(tmp_path, train):
    output, report = profile(
        tmp_path, SMALL, "--device", "model:H100", "--batch", "4", "--dtype", "float16", *["--train"] * train
    )
    check_files(tmp_path)
    assert "(modelled)" in output and "measured" not in report["times"]
    assert "<b>modelled</b>" in (tmp_path / "index.html").read_text()
    assert report["ceilings, per second"]["source"] == "data sheet"
    fused = report["runs"]["effkernels"]
    assert fused["backend"] == "cuda"
    assert fused["error"] is None and not fused["kernels"]
    # Of launches as small as these the assumed time of each is all that counts.
    first = fused["blocks"]["1"]
    assert first["milliseconds"]["step"]["median"] == pytest.approx(2.5e-3 * first["launches"], rel=0.2)
    assert first["launches"] == 3 or train
    for run in report["runs"].values():
        assert sum(op["milliseconds"] for op in run["ops"]) == pytest.approx(
            run["total"]["milliseconds"]["step"]["median"]
        )
        assert (run["saved_bytes"] is not None) == train


def test_a_model_with_nothing_to_convert(tmp_path):
    output, report = profile(tmp_path, "profiling.networks:without_ours", "--device", "model:L4")
    check_files(tmp_path)
    assert "nothing in it can be converted" in output
    assert report["runs"].keys() == {"eager"}
    assert report["runs"]["eager"]["blocks"].keys() == {"features", "classifier"}
    assert "speedup" not in report


def test_a_block_alone(tmp_path):
    _, report = profile(tmp_path, "profiling.networks:block", "--device", "model:T4", "--batch", "1")
    assert report["runs"]["effkernels"]["blocks"].keys() == {"0"}


def test_models_are_found_by_name(tmp_path):
    for name, size in (("timm:efficientnet_b0", 224), ("effkernels:efficientnet_b4", 380), ("efficientnet_b1", 240)):
        _, report = profile(tmp_path, name, "--device", "model:A100", "--batch", "1")
        assert report["input"].startswith(f"1 image of {size}x{size}")
        assert report["runs"].keys() == {"eager", "effkernels"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("eficientnet_b0",), "Invalid value for MODEL: must be a model of torchvision, timm, effkernels, or module:"),
        (("eficientnet_b0",), "got 'eficientnet_b0'; close to it: efficientnet_b0"),
        (("timm:resnet19",), "must be a model of timm, got 'timm:resnet19'; close to it: resnet18"),
        (("no_such_module:f",), "must begin with a module that can be imported"),
        (("profiling.networks:smal",), "must name a function of profiling.networks, got 'smal'; close to it: small"),
        (("profiling.networks:no_module",), "profiling.networks:no_module must return an nn.Module, got int"),
        ((SMALL, "--device", "model:h100"), "Invalid value for --device: must be one of cpu, cuda, model:A100"),
        ((SMALL, "--device", "model:h100"), "got 'model:h100'; close to it: model:H100"),
        ((SMALL, "--dtype", "float61"), "Invalid value for --dtype: must be one of float32, float16, bfloat16"),
        ((SMALL, "--device", "model:T4", "--dtype", "bfloat16"), "must be one of float32, float16 on T4, got bfloat16"),
        ((SMALL, "--device", "model:T4", "--image", __file__), "nothing is computed on a modelled device"),
    ],
)
def test_arguments_are_refused_with_a_reason(arguments, message):
    assert message in refused(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_without_a_gpu():
    assert "no GPU was found; accepted are cpu, model:A100" in refused(SMALL, "--device", "cuda")


def test_nothing_is_reported_where_answers_disagree(tmp_path, monkeypatch):
    def convert_wrongly(model):
        model[-1].register_forward_hook(lambda module, inputs, y: 1.001 * y)
        return model

    monkeypatch.setattr(effkernels, "convert", convert_wrongly)
    result = CliRunner().invoke(app, ["profile", SMALL, "--device", "cpu", "--out", str(tmp_path / "report")])
    assert isinstance(result.exception, RuntimeError)
    assert "the outputs disagree" in str(result.exception)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "train, expected",
    [
        (False, {"eager": (1, 6, 9, 3), "effkernels": (1, 0, 2, 1)}),
        (True, {"eager": (3, 19, 32, 11), "effkernels": (3, 6, 7, 7)}),
    ],
)
def test_the_passes_that_are_drawn(train, expected):
    """Of the block with a stride: over its input, the expanded map before and after the convolution, its output."""
    request = measure.Request(measure.networks_of(SMALL), 2, torch.float32, train)
    report = measure.model_on(GPUS["A100"], request)
    passes = {name: passes_of(run.by_block["2"]) for name, run in report.runs.items()}
    lanes = lanes_of(launch for of_run in passes.values() for launch in of_run)
    assert names_of(lanes) == ["x\n8x56x56", "E1\n32x56x56", "E2\n32x28x28", "y\n12x28x28"]
    for name, of_run in passes.items():
        assert tuple(round(sum(p.reads[lane] + p.writes[lane] for p in of_run), 1) for lane in lanes) == expected[name]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# What the page says of itself, in its title, when it is there.
PROBE = """
<script>
  const errors = [];
  addEventListener("error", (event) => errors.push(event.message || event.target.src), true);
  addEventListener("load", () => {
    const undecoded = [...document.images].filter((image) => !image.naturalWidth).length;
    const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
    const outside = requests.filter((name) => !name.startsWith("data:"));
    const wide = document.documentElement.scrollWidth > innerWidth;
    document.title = JSON.stringify({images: document.images.length, undecoded, outside, errors, wide});
  });
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_page_in_a_browser(tmp_path):
    profile(tmp_path, SMALL, "--device", "model:H100", "--train")
    page = tmp_path / "probed.html"
    page.write_text((tmp_path / "index.html").read_text().replace("<head>", f"<head>{PROBE}", 1))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900",
        f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert found == {"images": 4, "undecoded": 0, "outside": [], "errors": [], "wide": False}
