"""BatchNorm followed by an activation."""

from typing import Any

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
        update_running_statistics(running_mean, running_var, stats, count, momentum)
    return y


def update_running_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, stats: Tensor, count: int, momentum: float
) -> None:
    """running = (1 - momentum) * running + momentum * batch, in place, with the unbiased variance.

    Synchronised statistics bring a count of their own.
    """
    if running_mean is None or running_var is None:
        return
    mean, var, *of_all = stats.detach()
    if not of_all and count == 0:
        return
    total = of_all[0] if of_all else count
    for running, batch in ((running_mean, mean), (running_var, var * (total / (total - 1)))):
        if running.dtype == batch.dtype:
            running.lerp_(batch, momentum)
        else:  # which may not hold the batch's values, only their share
            running.copy_(running.to(batch.dtype).lerp(batch, momentum))
