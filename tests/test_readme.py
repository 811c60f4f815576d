"""README's Python examples run as they stand, one after another; and it says what the kept results say."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SAMPLES = ROOT / "docs" / "samples"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0]


def test_examples_run(capsys):
    text = README.read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 2
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, README.name, "exec"), namespace)
    output = capsys.readouterr().out
    assert "fused: 18 blocks" in output
    assert "torch.Size([2, 10])" in output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_of_the_repository_are_not_broken(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_figure_is_what_its_caption_says():
    caption = README.read_text().split("```")[0]
    report = json.loads((SAMPLES / "demo" / "report.json").read_text())
    assert f"{report['input']}, inference\non {report['machine']['threads']} CPU threads" in caption


def test_shares_of_memory_are_those_of_the_kept_benchmarks():
    run = json.loads((SAMPLES / "benchmarks.json").read_text())
    case = next(case for case in run["benchmarks"] if case["name"].startswith("test_kept_for_backward"))
    kept = {name: samples[0] for name, samples in case["extra_info"]["samples"].items()}
    default, minimal = (f"{kept[name] / kept['eager']:.2f}" for name in ("cpp", "cpp minimal"))
    text = " ".join(README.read_text().split())
    assert f"EfficientNet-B0 {default} of what eager keeps" in text
    assert f"it is {minimal}: the widest map" in text


def test_every_environment_variable_is_on_one_page():
    """Those of the project, wherever they are read."""
    sources = [p for d in ("effkernels", "csrc", "tests", "benchmarks", ".ci") for p in (ROOT / d).rglob("*")]
    texts = [p.read_text() for p in [*sources, ROOT / "setup.py"] if p.is_file() and p.suffix != ".pyc"]
    # Not names of macros, which C++ begins alike.
    used = {name for text in texts for name in re.findall(r"\bEFFKERNELS_[A-Z_]+\b", text)}
    page = (ROOT / "docs" / "backends.md").read_text()
    assert set(re.findall(r"^\| `(EFFKERNELS_\w+)`", page, re.MULTILINE)) == used
