"""What a network costs."""

import copy

import torch
from torch import Tensor, nn


def multiply_adds(model: nn.Module, *input_shape: int) -> int:
    """Multiply-adds of the convolutions and linear layers of one forward pass on an input [N, C, H, W].

    Nothing is computed: a copy of the model runs on the meta device.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += output.numel() * weight[0].numel()

    model = copy.deepcopy(model).to("meta").eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.empty(input_shape, device="meta"))
    return total
