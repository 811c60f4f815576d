"""Write the classes of blocks of each model, and how many blocks are of each, to benchmarks/shapes/.

python benchmarks/make_shapes.py
"""

import csv
import math
import pathlib
from collections import Counter
from typing import NamedTuple

from effkernels.models import Config
from effkernels.models.configs import CONFIGS

SHAPES = pathlib.Path(__file__).parent / "shapes"


class Block(NamedTuple):
    """A class of blocks: a row of benchmarks/shapes/."""

    kind: str  # mbconv or fused
    in_channels: int
    out_channels: int
    size: int
    kernel_size: int
    stride: int
    expand_ratio: int
    se_channels: int

    def __str__(self) -> str:
        channels = f"{self.in_channels}-{self.in_channels * self.expand_ratio}-{self.out_channels}"
        return f"{self.kind}-{channels}-{self.size}x{self.size}-k{self.kernel_size}s{self.stride}"


def blocks(config: Config) -> Counter[Block]:
    """The blocks of a network at its own resolution, in the order of their first appearance."""
    found: Counter[Block] = Counter()
    channels, size = config.stem_channels, math.ceil(config.resolution / 2)
    for stage in config.stages:
        for i in range(stage.repeats):
            stride = stage.stride if i == 0 else 1
            reduced = int(channels * stage.se_ratio)
            window = stage.kernel_size, stride
            found[Block(stage.block, channels, stage.out_channels, size, *window, stage.expand_ratio, reduced)] += 1
            channels, size = stage.out_channels, math.ceil(size / stride)
    return found


def main() -> None:
    SHAPES.mkdir(exist_ok=True)
    for name, config in CONFIGS.items():
        with (SHAPES / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*Block._fields, "count"))
            writer.writerows((*block, count) for block, count in blocks(config).items())


if __name__ == "__main__":
    main()
