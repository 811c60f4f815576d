"""The networks, as data."""

from dataclasses import dataclass, replace
from typing import Literal

from effkernels.models.scaling import scale


@dataclass(frozen=True)
class Stage:
    """`repeats` blocks; the first takes the stride and the change of channels."""

    block: Literal["mbconv", "fused"]
    repeats: int
    kernel_size: int
    stride: int
    expand_ratio: int
    out_channels: int
    se_ratio: float = 0.25


@dataclass(frozen=True)
class Config:
    """A network: its stages, and what they share.

    `drop_path` is the rate after the last block; it grows linearly from 0 at the first. `resolution` is the published
    evaluation size.
    """

    stem_channels: int
    stages: tuple[Stage, ...]
    head_channels: int
    resolution: int
    dropout: float
    drop_path: float = 0.2
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.1
    padding: Literal["auto", "same"] = "auto"
    in_channels: int = 3


def _mbconv(repeats: int, kernel_size: int, stride: int, expand_ratio: int, out_channels: int) -> Stage:
    return Stage("mbconv", repeats, kernel_size, stride, expand_ratio, out_channels)


def _fused(repeats: int, kernel_size: int, stride: int, expand_ratio: int, out_channels: int) -> Stage:
    return Stage("fused", repeats, kernel_size, stride, expand_ratio, out_channels, se_ratio=0.0)


# arXiv:1905.11946, table 1.
_B0 = Config(
    stem_channels=32,
    stages=(
        _mbconv(1, 3, 1, 1, 16),
        _mbconv(2, 3, 2, 6, 24),
        _mbconv(2, 5, 2, 6, 40),
        _mbconv(3, 3, 2, 6, 80),
        _mbconv(3, 5, 1, 6, 112),
        _mbconv(4, 5, 2, 6, 192),
        _mbconv(1, 3, 1, 6, 320),
    ),
    head_channels=1280,
    resolution=224,
    dropout=0.2,
)

# Width and depth multipliers, resolution and dropout as published; eps and momentum as in torchvision, for its weights.
_V1 = {
    "efficientnet_b0": (1.0, 1.0, 224, 0.2, 1e-5, 0.1),
    "efficientnet_b1": (1.0, 1.1, 240, 0.2, 1e-5, 0.1),
    "efficientnet_b2": (1.1, 1.2, 260, 0.3, 1e-5, 0.1),
    "efficientnet_b3": (1.2, 1.4, 300, 0.3, 1e-5, 0.1),
    "efficientnet_b4": (1.4, 1.8, 380, 0.4, 1e-5, 0.1),
    "efficientnet_b5": (1.6, 2.2, 456, 0.4, 1e-3, 0.01),
    "efficientnet_b6": (1.8, 2.6, 528, 0.5, 1e-3, 0.01),
    "efficientnet_b7": (2.0, 3.1, 600, 0.5, 1e-3, 0.01),
}

# arXiv:2104.00298, as released.
_V2 = {
    "efficientnet_v2_s": Config(
        stem_channels=24,
        stages=(
            _fused(2, 3, 1, 1, 24),
            _fused(4, 3, 2, 4, 48),
            _fused(4, 3, 2, 4, 64),
            _mbconv(6, 3, 2, 4, 128),
            _mbconv(9, 3, 1, 6, 160),
            _mbconv(15, 3, 2, 6, 256),
        ),
        head_channels=1280,
        resolution=384,
        dropout=0.2,
        norm_eps=1e-3,
    ),
    "efficientnet_v2_m": Config(
        stem_channels=24,
        stages=(
            _fused(3, 3, 1, 1, 24),
            _fused(5, 3, 2, 4, 48),
            _fused(5, 3, 2, 4, 80),
            _mbconv(7, 3, 2, 4, 160),
            _mbconv(14, 3, 1, 6, 176),
            _mbconv(18, 3, 2, 6, 304),
            _mbconv(5, 3, 1, 6, 512),
        ),
        head_channels=1280,
        resolution=480,
        dropout=0.3,
        norm_eps=1e-3,
    ),
    "efficientnet_v2_l": Config(
        stem_channels=32,
        stages=(
            _fused(4, 3, 1, 1, 32),
            _fused(7, 3, 2, 4, 64),
            _fused(7, 3, 2, 4, 96),
            _mbconv(10, 3, 2, 4, 192),
            _mbconv(19, 3, 1, 6, 224),
            _mbconv(25, 3, 2, 6, 384),
            _mbconv(7, 3, 1, 6, 640),
        ),
        head_channels=1280,
        resolution=480,
        dropout=0.4,
        norm_eps=1e-3,
    ),
    "efficientnet_v2_xl": Config(
        stem_channels=32,
        stages=(
            _fused(4, 3, 1, 1, 32),
            _fused(8, 3, 2, 4, 64),
            _fused(8, 3, 2, 4, 96),
            _mbconv(16, 3, 2, 4, 192),
            _mbconv(24, 3, 1, 6, 256),
            _mbconv(32, 3, 2, 6, 512),
            _mbconv(8, 3, 1, 6, 640),
        ),
        head_channels=1280,
        resolution=512,
        dropout=0.4,
        norm_eps=1e-3,
    ),
}

CONFIGS: dict[str, Config] = {
    name: replace(
        scale(_B0, width, depth), resolution=resolution, dropout=dropout, norm_eps=eps, norm_momentum=momentum
    )
    for name, (width, depth, resolution, dropout, eps, momentum) in _V1.items()
} | _V2
