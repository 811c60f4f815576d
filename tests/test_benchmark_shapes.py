"""The shapes in benchmarks/shapes/ are those of the models that they are named after."""

import csv
import pathlib

import torch

import effkernels
from effkernels.models import create_model

SHAPES = pathlib.Path(__file__).parents[1] / "benchmarks" / "shapes"


def test_shapes_are_those_of_the_model():
    blocks = []

    def see(block, inputs, output):
        depthwise = next(m for m in block.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)
        squeezed = next(m for m in block.modules() if isinstance(m, effkernels.SqueezeExcite)).parameters()
        se_channels = next(squeezed).shape[0]
        c, k, s = depthwise.in_channels, depthwise.kernel_size[0], depthwise.stride[0]
        blocks.append((c, inputs[0].shape[2], k, s, se_channels))

    for file in SHAPES.glob("*.csv"):
        with file.open() as rows:
            listed = [tuple(map(int, row[:-1])) for row in [*csv.reader(rows)][1:]]
        model = create_model(file.stem, device="meta").eval()
        for module in model.modules():
            if isinstance(module, effkernels.MBConv):
                module.register_forward_hook(see)
        with torch.no_grad(), effkernels.use_backend("eager"):
            model(torch.empty(1, 3, 224, 224, device="meta"))
        # A squeeze-excite width may go with several convolutions: one is enough.
        assert {row[:4] for row in listed} == {block[:4] for block in blocks}
        assert set(listed) <= set(blocks)
        blocks.clear()
