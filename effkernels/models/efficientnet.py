"""EfficientNet V1 and V2 (arXiv:1905.11946, arXiv:2104.00298)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effkernels.models.configs import CONFIGS, Config
from effkernels.nn import ConvBNAct, FusedMBConv, MBConv

_BLOCKS: dict[str, type[MBConv] | type[FusedMBConv]] = {"mbconv": MBConv, "fused": FusedMBConv}


def list_models() -> list[str]:
    """The names that `create_model` accepts."""
    return list(CONFIGS)


def create_model(
    name: str, num_classes: int = 1000, *, device: Any = None, dtype: torch.dtype | None = None, **overrides: Any
) -> "EfficientNet":
    """An EfficientNet with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the classifier.
        device, dtype: of the parameters.
        **overrides: fields of `effkernels.models.Config`, such as dropout, drop_path, norm_eps or padding.

    Raises:
        ValueError: there is no model of this name.
        TypeError: an override is no field of `Config`.
    """
    if name not in CONFIGS:
        raise ValueError(f"create_model: name must be one of {', '.join(CONFIGS)}, got {name!r}")
    return EfficientNet(replace(CONFIGS[name], **overrides), num_classes, device=device, dtype=dtype)


class EfficientNet(nn.Module):
    """Stem, stages of MBConv and Fused-MBConv blocks, head, classifier.

    Shape: [N, in_channels, H, W] -> [N, num_classes].
    """

    def __init__(
        self, config: Config, num_classes: int = 1000, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shared = {
            "padding": config.padding,
            "norm_eps": config.norm_eps,
            "norm_momentum": config.norm_momentum,
            **factory,
        }
        channels = config.stem_channels
        self.stem = ConvBNAct(config.in_channels, channels, kernel_size=3, stride=2, **shared)
        self.stages = nn.Sequential()
        count, total = 0, sum(stage.repeats for stage in config.stages)
        for stage in config.stages:
            blocks = nn.Sequential()
            for i in range(stage.repeats):
                block = _BLOCKS[stage.block](
                    channels,
                    stage.out_channels,
                    kernel_size=stage.kernel_size,
                    stride=stage.stride if i == 0 else 1,
                    expand_ratio=stage.expand_ratio,
                    se_ratio=stage.se_ratio,
                    drop_path=config.drop_path * count / total,
                    **shared,
                )
                blocks.append(block)
                channels = stage.out_channels
                count += 1
            self.stages.append(blocks)
        self.head = ConvBNAct(channels, config.head_channels, **shared)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.head_channels, num_classes, **factory)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stages(self.stem(x)))
        y = self.classifier(self.dropout(y.mean((2, 3))))
        return y

    def load_torchvision_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copy the weights of the same network of torchvision, whose parameters come in the same order.

        Raises:
            ValueError: the tensors do not match in number.
            RuntimeError: the tensors do not match in shape.
        """
        names = self.state_dict().keys()
        if len(names) != len(state_dict):
            raise ValueError(f"load_torchvision_state_dict: {len(names)} tensors expected, got {len(state_dict)}")
        self.load_state_dict(dict(zip(names, state_dict.values(), strict=True)))


def _initialise(module: nn.Module) -> None:
    """Normal with deviation sqrt(2 / fan out) for convolutions, as published."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
