"""Compound scaling (arXiv:1905.11946): more channels and more blocks by one rule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effkernels.models.configs import Config


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and never less than 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


def scale(config: Config, width: float, depth: float) -> Config:
    """`config` with its channels multiplied by `width` and the repeats of each stage by `depth`, rounded up."""
    stages = tuple(
        replace(
            stage, repeats=math.ceil(stage.repeats * depth), out_channels=round_channels(stage.out_channels * width)
        )
        for stage in config.stages
    )
    return replace(
        config,
        stem_channels=round_channels(config.stem_channels * width),
        stages=stages,
        head_channels=round_channels(config.head_channels * width),
    )
