"""What runs where, and why."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effkernels import backends
from effkernels.backends import Decision
from effkernels.ops import _tiles


@dataclass(frozen=True)
class Explanation:
    """The decisions of one run, in order: a block's comes before those of the ops inside it.

    Printed, equal calls share a line.
    """

    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        if not self.decisions:
            return "no effkernels op was called"
        calls = Counter(
            (
                d.op,
                "x".join(map(str, d.shape)),
                str(d.dtype).removeprefix("torch."),
                str(d.device),
                ", ".join(d.kernels),
                d.remark,
            )
            for d in self.decisions
        )
        rows = [(*call, f"{count} times" if count > 1 else "") for call, count in calls.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        reasons = dict.fromkeys(
            f"not {backend}: {reason}" for d in self.decisions for backend, reason in d.rejected.items()
        )
        return "\n".join([*lines, *reasons])


def explain(module_or_op: Callable[..., Any], *example_inputs: Any, **kwargs: Any) -> Explanation:
    """Call a module, or an op of `effkernels.ops`, and tell which backend took each op call and why not the others.

    Of CUDA launches whose tile `effkernels.autotune` found, or `effkernels.ops.use_tile` set, the tile is told too.

    A module is copied first and the CPU's random state is restored, so that its call leaves no trace.

    >>> print(effkernels.explain(model, images))
    """
    if isinstance(module_or_op, nn.Module):
        module_or_op = copy.deepcopy(module_or_op)
    watch = _tiles.Watch(_tell) if _tiles.asked_for else nullcontext()
    with torch.random.fork_rng(devices=[]), backends.record_decisions() as decisions, watch:
        module_or_op(*example_inputs, **kwargs)
    return Explanation(tuple(decisions))


def _tell(run: Callable[[], Any], launches: list[_tiles.Launch]) -> None:
    for launch in dict.fromkeys(launch for launch in launches if launch.by):
        backends.remark(f"{launch.op}: {launch} by {launch.by}")
