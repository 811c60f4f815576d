"""BatchNorm over the batches of several processes: the one place where they exchange what each has summed.

Batches may differ in size, and be empty: everything is weighted by its count. A process group goes by its name, "" for
none, when nothing is exchanged. Statistics are [2, C], mean and biased variance; those of a group have a third row, the
count of values.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def group_name(op: str, process_group: Any, backend: str) -> str:
    if process_group is None:
        return ""
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        kind = type(process_group).__name__
        raise TypeError(f"{op}: process_group must be a torch.distributed.ProcessGroup or None, got {kind}")
    if backend == "eager":
        raise RuntimeError(f"{op}: backend 'eager' has no synchronised statistics; use_backend takes others")
    return process_group.group_name


def count(x: Tensor) -> int:
    """Of values per channel."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def statistics_of_all(stats: Tensor, x: Tensor, group: str) -> Tensor:
    """The statistics over all processes from those of x, the batch of this one."""
    if not group:
        return stats
    if count(x) == 0:
        stats = torch.zeros_like(stats)
    mean, var = stats.double()  # where a large mean costs the variance no digits
    moments = count(x) * torch.stack([mean, var + mean.square(), torch.ones_like(mean)])
    mean, square, total = _sum(moments, group)
    mean, square = mean / total, square / total
    return torch.stack([mean, (square - mean.square()).clamp_min(0), total]).to(stats.dtype)


def means_of_all(sums: Tensor, stats: Tensor, x: Tensor, group: str) -> Tensor:
    """The means over all processes, to whose batches `stats` belong, from the sums over x, the batch of this one."""
    return _sum(sums, group) / stats[2] if group else sums / count(x)


def _sum(values: Tensor, group: str) -> Tensor:
    # Functional collectives, which a traced graph can hold.
    collectives = torch.ops._c10d_functional
    total: Tensor = collectives.wait_tensor(collectives.all_reduce(values, "sum", group))
    return total
