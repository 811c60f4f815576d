"""effkernels.models: the networks are the published ones."""

import math
import pathlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effkernels
from effkernels.models import Config, Stage, create_model, list_models, multiply_adds, scale
from effkernels.models.configs import CONFIGS
from effkernels.models.scaling import round_channels

TABLE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"

# Parameters, and the multiply-adds that the papers give.
PUBLISHED = {
    "efficientnet_b0": (5_288_548, "0.39 B"),
    "efficientnet_b1": (7_794_184, "0.70 B"),
    "efficientnet_b2": (9_109_994, "1.0 B"),
    "efficientnet_b3": (12_233_232, "1.8 B"),
    "efficientnet_b4": (19_341_616, "4.2 B"),
    "efficientnet_b5": (30_389_784, "9.9 B"),
    "efficientnet_b6": (43_040_704, "19 B"),
    "efficientnet_b7": (66_347_960, "37 B"),
    "efficientnet_v2_s": (21_458_488, "8.8 B"),
    "efficientnet_v2_m": (54_139_356, "24 B"),
    "efficientnet_v2_l": (118_515_272, "53 B"),
    "efficientnet_v2_xl": (208_119_808, "94 B"),
}


def torchvision_model(name):
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    if not hasattr(models, name):
        pytest.skip(f"torchvision has no {name}")
    return getattr(models, name)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_every_model_is_tested():
    assert list_models() == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_documented_multiply_adds(name):
    model, resolution = create_model(name, device="meta"), CONFIGS[name].resolution
    count, paper = PUBLISHED[name]
    assert parameters(model) == count
    billions = multiply_adds(model, 1, 3, resolution, resolution) / 1e9
    assert f"| {name} | {resolution} | {count:,} | {billions:.3f} B | {paper} |" in TABLE.read_text().splitlines()


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_are_those_of_torchvisions_model(name):
    with torch.device("meta"):
        model = torchvision_model(name)().eval()
    shape = (1, 3, CONFIGS[name].resolution, CONFIGS[name].resolution)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device="meta"))
    assert 2 * multiply_adds(create_model(name, device="meta"), *shape) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b5", "efficientnet_v2_s"])
@pytest.mark.parametrize("training", [True, False])
def test_with_torchvisions_weights_it_is_torchvisions_model(name, training):
    theirs = torchvision_model(name)(num_classes=10)
    ours = create_model(name, num_classes=10)
    ours.load_torchvision_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    results = []
    with effkernels.use_backend("eager"), torch.no_grad():
        for model in (theirs, ours):
            torch.manual_seed(0)
            results.append((model.train(training)(x), *model.state_dict().values()))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_weights_start_as_published():
    model = create_model("efficientnet_b0", num_classes=100)
    conv = model.stages[1][0].project.conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / conv.out_channels), rel=0.05)
    assert model.stages[1][0].se.reduce.bias.count_nonzero() == 0
    assert model.classifier.weight.abs().max().item() == pytest.approx(0.1, rel=0.01)
    assert model.classifier.bias.count_nonzero() == 0


def test_drop_path_grows_linearly():
    model = create_model("efficientnet_b0", device="meta", drop_path=0.32)
    rates = [block.drop_path.p for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.02 * i for i in range(16)])


def test_overrides():
    model = create_model(
        "efficientnet_v2_s", 7, device="meta", dropout=0.0, norm_eps=0.5, padding="same", in_channels=1
    )
    assert model.classifier.out_features == 7
    assert model.dropout.p == 0
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.5}
    with effkernels.use_backend("eager"):
        assert model(torch.empty(2, 1, 65, 65, device="meta")).shape == (2, 7)
        assert model.stem(torch.empty(2, 1, 65, 65, device="meta")).shape == (2, 24, 33, 33)


@pytest.mark.parametrize(
    ("channels", "rounded"), [(1, 8), (8.8, 8), (11.9, 16), (17.6, 16), (35.2, 32), (19, 24), (44.8, 48), (576, 576)]
)
def test_round_channels(channels, rounded):
    assert round_channels(channels) == rounded


def test_scale_rounds_repeats_up():
    config = Config(32, (Stage("mbconv", 2, 3, 1, 6, 24),), 1280, resolution=224, dropout=0.2)
    scaled = scale(config, width=1.4, depth=1.1)
    assert (scaled.stem_channels, scaled.head_channels) == (48, 1792)
    assert (scaled.stages[0].repeats, scaled.stages[0].out_channels) == (3, 32)
    assert scale(config, 1.0, 1.0) == config


def test_the_simplified_network_is_seven_calls():
    stages = [(16, 1, 1), (24, 2, 6), (40, 2, 6), (80, 2, 6), (112, 1, 6), (192, 2, 6), (320, 1, 6)]
    blocks, channels = [], 32
    for out, stride, ratio in stages:
        hidden = channels * ratio
        blocks.append(
            effkernels.MBConv(
                channels,
                out,
                stride=stride,
                expand_ratio=ratio,
                expand=True,
                se_channels=hidden // 4,
                se_activation="relu",
            )
        )
        channels = out
    assert torch.nn.Sequential(*blocks)(torch.randn(2, 32, 32, 32)).shape == (2, 320, 2, 2)
    assert [block.expand is not None for block in blocks] == [True] * 7


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"name must be one of efficientnet_b0, .* got 'efficientnet_b9'"):
        create_model("efficientnet_b9")
    with pytest.raises(TypeError, match="colour"):
        create_model("efficientnet_b0", colour="red")
    with pytest.raises(ValueError, match="360 tensors expected, got 0"):
        create_model("efficientnet_b0", device="meta").load_torchvision_state_dict({})
