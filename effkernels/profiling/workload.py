"""What is profiled."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from effkernels import backends

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Workload:
    """One inference of a model on x; or with `train` one step, but for the optimiser: forward, a loss, backward.

    The loss is the mean square of what the model returns.
    """

    model: nn.Module
    x: Tensor
    train: bool = False
    backend: str = "auto"
    drop: bool = True  # else only BatchNorms are in training mode, so that nothing is dropped at random

    def run(self, before_backward: Callable[[], None] = lambda: None) -> list[Tensor]:
        """The tensors that the model returns."""
        self.model.train(self.train)
        if not self.drop:
            for module in self.model.modules():
                module.training &= isinstance(module, _BatchNorm)
        self.model.zero_grad()
        with backends.use_backend(self.backend), torch.set_grad_enabled(self.train):
            outputs = [t for t in tree_leaves(self.model(self.x)) if isinstance(t, Tensor)]
            if self.train:
                loss = torch.stack([t.square().mean() for t in outputs if t.requires_grad]).sum()
                before_backward()
                loss.backward()
        return outputs
