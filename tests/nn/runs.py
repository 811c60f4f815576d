"""Runs of one module on a backend, in eager PyTorch and in float64, held against each other."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import effkernels
from effkernels.ops._cases import assert_close_to_reference

Outcome = dict[str, list[Tensor]]


def forward_backward(module: nn.Module, inputs: Sequence[Tensor]) -> Outcome:
    """Outputs, gradients and running statistics of one pass over each input, in a random state of its own."""
    outcome: Outcome = {"outputs": [], "input gradients": [], "gradients": [], "statistics": []}
    for seed, x in enumerate(inputs):
        torch.manual_seed(seed)
        x = x.clone().requires_grad_()
        y = module(x)
        module.zero_grad()
        # A loss that BatchNorm's invariances leave alone.
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        outcome["outputs"].append(y.detach())
        outcome["input gradients"].append(x.grad)
        outcome["gradients"] += [p.grad.clone() for p in module.parameters() if p.grad is not None]
        outcome["statistics"] += [b.clone() for b in module.buffers() if b.is_floating_point()]
    return outcome


@torch.no_grad()
def inference(module: nn.Module, inputs: Sequence[Tensor]) -> Outcome:
    return {"outputs": [module(x) for x in inputs]}


def three_sgd_steps(module: nn.Module, inputs: Sequence[Tensor]) -> Outcome:
    """How far the parameters and statistics have moved."""
    torch.manual_seed(0)
    tensors = [t for t in module.state_dict().values() if t.is_floating_point()]
    start = [t.clone() for t in tensors]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for x in inputs[:3]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), torch.arange(len(x))).backward()
        optimizer.step()
    return {"updates": [after - before for after, before in zip(tensors, start, strict=True)]}


def without_chance(module: nn.Module) -> nn.Module:
    """On a GPU what dropout and drop path draw depends on the dtype: no float64 run could be held against another."""
    if torch.get_default_device().type == "cuda":
        for part in module.modules():
            for name in ("p", "drop_prob"):
                if isinstance(getattr(part, name, None), float):
                    setattr(part, name, 0.0)
    return module


def assert_as_close_as_eager(
    run: Callable[[nn.Module, Sequence[Tensor]], Outcome],
    module: nn.Module,
    inputs: Sequence[Tensor],
    original: nn.Module | None = None,
) -> None:
    """`run` of `module` on the current backend against `run` of `original` in eager PyTorch, both against float64."""
    original = original or module
    got = run(copy.deepcopy(module), inputs)
    with effkernels.use_backend("eager"):
        eager = run(copy.deepcopy(original), inputs)
        reference = run(copy.deepcopy(original).double(), [x.double() for x in inputs])
    assert_outcomes_close(got, eager, reference)


def assert_outcomes_close(got: Outcome, eager: Outcome, reference: Outcome) -> None:
    for name, values in reference.items():
        if not values:
            continue
        assert len(got[name]) == len(eager[name]) == len(reference[name]), name
        vectors = [_joined(outcome[name], reference[name]) for outcome in (got, eager, reference)]
        assert (vectors[1] - vectors[2]).norm() < 0.05 * vectors[2].norm(), f"{name}: eager is no measure"
        assert_close_to_reference(*vectors)


def _joined(tensors: list[Tensor], reference: list[Tensor]) -> Tensor:
    """One vector in which every tensor has about the same norm; powers of two scale without rounding.

    Tensors that are exactly zero in theory, such as the gradient of a BatchNorm's bias before another BatchNorm, are
    noise and left out.
    """
    noise = 1e-9 * max(r.norm() for r in reference)
    pairs = [(t, r.norm()) for t, r in zip(tensors, reference, strict=True) if r.norm() > noise]
    return torch.cat([t.flatten() * 2.0 ** -norm.log2().round().item() for t, norm in pairs])
