"""`effkernels study`, and the page that is written from what it saved."""

import pathlib
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from effkernels import study
from effkernels.cli import app
from effkernels.models import EfficientNet, multiply_adds
from effkernels.models.configs import CONFIGS
from effkernels.study import EAGER, OURS, PAPER, STUDIED, VARIANTS, Study, replaced

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def tiny(name):
    """As many stages as the network has, of a block each."""
    config = CONFIGS[name]
    stages = tuple(replace(stage, repeats=1, out_channels=8 * (i + 1)) for i, stage in enumerate(config.stages))
    return replace(config, stem_channels=8, stages=stages, head_channels=16, resolution=64)


def test_the_variants_of_b4_are_those_of_the_paper_as_far_as_it_tells():
    config = CONFIGS["efficientnet_b4"]
    for fused, (parameters, operations, *_) in PAPER.items():
        model = EfficientNet(replaced(config, VARIANTS[fused]), device="meta")
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6 * parameters, rel=0.02)
        counted = multiply_adds(model, 1, 3, config.resolution, config.resolution)
        # The paper counts something more, also in the network that it left alone.
        assert 0.96 < counted / (1e9 * operations) < 1


def test_stages_are_replaced_and_keep_their_squeeze_excite():
    config = CONFIGS["efficientnet_b0"]
    found = replaced(config, 5)
    assert [stage.block for stage in found.stages] == 5 * ["fused"] + 2 * ["mbconv"]
    assert [stage.kernel_size for stage in found.stages] == [3, 3, 3, 3, 5, 5, 3]
    assert {stage.se_ratio for stage in found.stages} == {0.25}
    assert replaced(config, 0) == config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("study"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "SECONDS", 0.0)
        patch.setattr(study, "CONFIGS", {"efficientnet_b4": tiny("efficientnet_b4")})
        patch.setattr(study, "BATCHES", {"efficientnet_b4": (1, 2, 4)})
        result = CliRunner().invoke(app, ["study", "--out", str(folder), "--threads", "1"], env={"COLUMNS": "200"})
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "no GPU ran" in result.output
    return folder


def test_everything_is_measured_and_modelled(saved):
    found = Study.read(saved / "study.json")
    devices, directions, implementations = 1 + len(STUDIED), 2, 2
    assert [network.name for network in found.networks] == ["efficientnet_b4"]
    assert len(found.runs) == devices * directions * implementations * len(VARIANTS)
    for run in found.runs:
        assert run.modelled == (run.device != "CPU")
        assert len(run.stages) == 7 and min(run.stages) > 0
        assert sum(run.stages) < run.milliseconds.high
        assert bool(run.early) == run.modelled
        if run.modelled:
            assert sum(run.early.values()) == pytest.approx(sum(run.stages[:3]))
    # A stage that is not replaced costs the same, and in MBConv our kernels move fewer bytes.
    none, early = (found.run("efficientnet_b4", fused, EAGER, "training", "T4") for fused in ("none", "1-3"))
    assert none.stages[3:] == early.stages[3:] and none.stages[2] != early.stages[2]
    ours = found.run("efficientnet_b4", "none", OURS, "inference", "T4")
    assert ours.stages[0] < found.run("efficientnet_b4", "none", EAGER, "inference", "T4").stages[0]


def test_figure_and_tables_are_written(saved):
    assert (saved / "study.png").read_bytes().startswith(b"\x89PNG")
    text = (saved / "tables.md").read_text()
    assert text.count("paper: V100") == 1 and "A100, training, modelled" in text and "CPU, inference, measured" in text


@pytest.fixture(scope="module")
def kept():
    return Study.read(DOCS / "samples" / "study" / "study.json")


def test_the_page_has_the_tables_of_the_saved_study(kept):
    page = (DOCS / "v2_question.md").read_text()
    for name, table in study.tables(kept).items():
        assert table in page, f"docs/v2_question.md has another table of the {name} than docs/samples/study/tables.md"


def test_the_page_draws_its_conclusions_from_the_saved_study(kept):
    page = " ".join((DOCS / "v2_question.md").read_text().split())

    def three_fused(implementation, direction, *devices, network="efficientnet_b4"):
        """The speed with three fused stages over that with none: the least and the greatest."""
        rates = [
            [kept.run(network, fused, implementation, direction, device).images_per_second for fused in ("1-3", "none")]
            for device in devices
        ]
        ratios = [fused / none for fused, none in rates]
        return f"{min(ratios):.2f}" if len(devices) == 1 else f"{min(ratios):.2f} to {max(ratios):.2f}"

    assert f"B4 runs at {three_fused(OURS, 'inference', 'CPU')} of the speed" in page
    assert f"at {three_fused(OURS, 'inference', *STUDIED)} of it by the model" in page
    assert f"run at {three_fused(OURS, 'training', 'CPU')} of the speed of none" in page
    assert f"eagerly they ran at {three_fused(EAGER, 'training', 'CPU')}." in page
    ours, eager = (three_fused(implementation, "training", *STUDIED) for implementation in (OURS, EAGER))
    assert f"an advantage of {ours}, of {eager} eagerly" in page
    assert f"with {three_fused(OURS, 'training', *STUDIED, network='efficientnet_b0')} for three stages" in page

    for network in ("efficientnet_b0", "efficientnet_b4"):
        for device in ("CPU", *STUDIED):
            for direction in ("inference", "training"):
                runs = [kept.run(network, fused, OURS, direction, device) for fused in ("none", "1-7")]
                faster = [mbconv < fused for mbconv, fused in zip(*(run.stages for run in runs), strict=True)]
                assert all(faster[4:])
                assert all(faster) or (direction == "training" and device != "CPU" and not any(faster[1:2]))
    early = kept.run("efficientnet_b4", "none", EAGER, "training", "V100").early
    fused = kept.run("efficientnet_b4", "1-3", EAGER, "training", "V100").early
    total, passes = sum(early.values()), "passes around them"
    assert early["depthwise convolution"] / total == pytest.approx(1 / 8, abs=0.02)
    assert early[passes] / total == pytest.approx(3 / 4, abs=0.02)
    assert (early[passes] - fused[passes]) / (total - sum(fused.values())) == pytest.approx(3 / 4, abs=0.02)
