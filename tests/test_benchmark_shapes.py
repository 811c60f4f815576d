"""The shapes in benchmarks/shapes/ are those of the models that they are named after."""

import csv
import pathlib
from collections import Counter

import pytest
import torch

import effkernels
from effkernels.models import create_model, list_models
from effkernels.models.configs import CONFIGS

SHAPES = pathlib.Path(__file__).parents[1] / "benchmarks" / "shapes"


def test_every_model_has_a_file():
    assert {file.stem for file in SHAPES.iterdir()} == set(list_models())


@pytest.mark.parametrize("name", list_models())
def test_shapes_are_those_of_the_model(name):
    """As the built network has them when it runs, not as its configuration says."""
    found = Counter()

    def see(block, inputs, output):
        main = block.depthwise or block.expand
        hidden, c, size = main.conv.out_channels, *inputs[0].shape[1:3]
        squeezed = 0 if block.se is None else block.se.reduce.out_channels
        k, s = main.conv.kernel_size[0], main.conv.stride[0]
        ratio = 1 if block.project is None else hidden // c
        kind = "fused" if isinstance(block, effkernels.FusedMBConv) else "mbconv"
        found[kind, c, output.shape[1], size, k, s, ratio, squeezed] += 1

    model = create_model(name, device="meta").eval()
    for module in model.modules():
        if isinstance(module, effkernels.MBConv | effkernels.FusedMBConv):
            module.register_forward_hook(see)
    with torch.no_grad(), effkernels.use_backend("eager"):
        model(torch.empty(1, 3, *2 * [CONFIGS[name].resolution], device="meta"))
    with (SHAPES / f"{name}.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    listed = {(kind, *map(int, numbers)): int(count) for kind, *numbers, count in rows}
    assert len(listed) == len(rows)  # each class once
    assert listed == found
