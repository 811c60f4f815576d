"""BatchNorm followed by an activation."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels import backends
from effkernels.ops import _checks
from effkernels.ops._activation import ACTIVATIONS, activate
from effkernels.ops.batch_norm import op
from effkernels.ops.batch_norm.synchronised import group_name


def bn_act(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "silu",
    process_group: Any = None,
) -> Tensor:
    """BatchNorm over [N, C, H, W] followed by `activation`. Only x is saved for backward.

    Equivalent to `F.silu(F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps))`.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or (cpp, eager) float64; any strides.
        bn_weight, bn_bias: [C] or None; float32 or the dtype of x.
        running_mean, running_var: [C]; used when not training, else updated in place with `momentum`, unless None.
        activation: "silu", "relu", "relu6", "hardswish" or "identity".
        process_group: a `torch.distributed.ProcessGroup` whose processes share batch statistics, as `nn.SyncBatchNorm`
            does, on any device; their batches may differ in size. None: each has its own.

    Returns:
        [N, C, H, W], the dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or batch statistics would be of
            a single value per channel.
        RuntimeError: the backend asked for by `use_backend` cannot run, or is "eager" and there is a process group.
    """
    name = "bn_act"
    _checks.map_tensor(name, "x", x)
    _checks.batch_norm(name, x, x.shape[1], bn_weight, bn_bias, running_mean, running_var, training)
    act = _checks.code(name, "activation", activation, ACTIVATIONS)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if training and process_group is None:
        _checks.more_than_one_value(name, count, x.shape)
    backend = backends.choose(name, x)
    group = group_name(name, process_group if training else None, backend)
    if backend == "eager":
        return activate(F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps), act)
    y, stats = op.BN_ACT(backend, x, bn_weight, bn_bias, running_mean, running_var, training, group, eps, act)
    if training:
        update_running_statistics(Running(running_mean, running_var, stats, count, momentum))
    return y


class Running(NamedTuple):
    """The running statistics of a BatchNorm, [C] or None, and those of a batch of so many `values` a channel."""

    mean: Tensor | None
    var: Tensor | None
    batch: Tensor
    values: int
    momentum: float


def update_running_statistics(*norms: Running) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place, with the unbiased variance.

    Synchronised statistics bring a count of their own. Several BatchNorms take as many launches as one.
    """
    means: list[Tensor] = []
    variances: list[Tensor] = []
    batch_means: list[Tensor] = []
    batch_variances: list[Tensor] = []
    factors: list[float] = []
    momenta: list[float] = []
    for norm in norms:
        mean, var, *of_all = norm.batch.detach().unbind()
        if norm.mean is None or norm.var is None or (norm.values == 0 and not of_all):
            continue
        means.append(norm.mean)
        variances.append(norm.var)
        batch_means.append(mean)
        batch_variances.append(var * (of_all[0] / (of_all[0] - 1)) if of_all else var)
        factors.append(1.0 if of_all else norm.values / (norm.values - 1))
        momenta.append(norm.momentum)
    if not means:
        return
    running, batch = means + variances, batch_means + list(torch._foreach_mul(batch_variances, factors))
    # Narrow ones may not hold the batch's values, only their share.
    wide = [t if t.dtype == b.dtype else t.to(b.dtype) for t, b in zip(running, batch, strict=True)]
    torch._foreach_lerp_(wide, batch, momenta * 2)
    if any(t.dtype != updated.dtype for t, updated in zip(running, wide, strict=True)):
        torch._foreach_copy_(running, wide)
