"""The end of a block in training, after its wide convolution: BatchNorm, squeeze-excite, projection and shortcut."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from effkernels import backends
from effkernels.ops import _checks
from effkernels.ops._activation import ACTIVATIONS, GATES
from effkernels.ops.batch_norm import Running, update_running_statistics
from effkernels.ops.batch_norm.op import statistics_dtype
from effkernels.ops.batch_norm.synchronised import group_name
from effkernels.ops.bn_project import op, reference
from effkernels.ops.mbconv_inference import Gate

_NAME = "bn_project"


class Stage(NamedTuple):
    """activation(bn(conv(x))): a convolution and the BatchNorm after it, as for `dwconv_bn_swish`.

    Processes of a group share batch statistics; a bias before them gets a gradient of 0, its sum over the processes.
    """

    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float
    activation: str
    process_group: Any = None


def bn_project(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    squeeze_excite: Gate | None,
    project: Stage,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "silu",
    process_group: Any = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The end of a Fused-MBConv (arXiv:2104.00298): `project(squeeze_excite(act(bn(x)))) * scale + residual`.

    Saved for backward are x, the raw output of the projection, and vectors.

    Args:
        x: [N, M, H, W], N > 0, the raw output of a convolution; dtypes and layouts as for `mbconv`.
        bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, activation, process_group: as for
            `bn_act`.
        squeeze_excite, project, scale: as for `mbconv`.
        residual: [N, O, H, W] in the dtype of x, added to the output.

    Returns:
        [N, O, H, W] in the dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or batch statistics would be of
            a single value per channel.
        RuntimeError: the backend asked for by `use_backend` cannot run, or is "eager" and there is a process group.
    """
    _checks.map_tensor(_NAME, "x", x)
    n, hidden, height, width = x.shape
    out = project.weight.shape[0]
    _checks.batch_norm(_NAME, x, hidden, bn_weight, bn_bias, running_mean, running_var, training)
    act = _checks.code(_NAME, "activation", activation, ACTIVATIONS)
    dtype = _checks.autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)  # and the op the weight
    check_stage(_NAME, "project", project, x, (out, hidden, 1, 1), x.shape)
    if project.activation != "identity":
        raise ValueError(f"{_NAME}: project must have no activation, got {project.activation!r}")
    if training and process_group is None:
        _checks.more_than_one_value(_NAME, n * height * width, x.shape)
    _checks.shaped(_NAME, "scale", scale, [n], x)
    _checks.shaped(_NAME, "residual", residual, [n, out, height, width], x)
    if residual is not None:
        _checks.same_dtype(_NAME, "residual", residual, "x", x)

    backend = backends.choose(_NAME, x, among=op.BN_PROJECT.kernels)
    given = (process_group if training else None, project.process_group if project.training else None)
    groups = [group_name(_NAME, group, backend) for group in given]
    norm = (bn_weight, bn_bias, running_mean, running_var)
    if backend == "eager":
        return reference.bn_project(x, *norm, training, momentum, eps, act, squeeze_excite, project, scale, residual)
    weights: tuple[Tensor | None, ...] = (None,) * 4
    codes = [act, 0, 0]
    if squeeze_excite is not None:
        weights = matrices(squeeze_excite)
        codes = [act, ACTIVATIONS[squeeze_excite.activation], GATES[squeeze_excite.gate]]
    y, _, stats2, stats3, _, _ = op.BN_PROJECT(
        backend,
        x,
        bn_weight,
        bn_bias,
        *((None, None) if training else (running_mean, running_var)),
        *weights,
        *stage_tensors(project),
        None if scale is None else scale.to(statistics_dtype(x)),
        residual,
        groups,
        [eps, project.eps],
        codes,
    )
    count = n * height * width
    norms = (
        (training, Running(running_mean, running_var, stats2, count, momentum)),
        (project.training, Running(project.running_mean, project.running_var, stats3, count, project.momentum)),
    )
    update_running_statistics(*(norm for training, norm in norms if training))
    return y


def matrices(gate: Gate) -> tuple[Tensor | None, ...]:
    """The weights of a gate as the ops take them."""
    return tuple(t if t is None or t.dim() == 1 else t.flatten(1) for t in gate[:4])


def check_stage(op: str, name: str, stage: Stage, x: Tensor, shape: tuple[int, ...], output: Sequence[int]) -> None:
    _checks.shaped(op, f"{name}.weight", stage.weight, shape, x)
    if _checks.autocast_dtype(x) is None:
        _checks.same_dtype(op, f"{name}.weight", stage.weight, "x", x)
    _checks.shaped(op, f"{name}.bias", stage.bias, shape[:1], x)
    _checks.batch_norm(f"{op}: {name}", x, shape[0], *stage[2:7])
    _checks.code(op, f"{name}.activation", stage.activation, ACTIVATIONS)
    if stage.training and stage.process_group is None:
        _checks.more_than_one_value(op, output[0] * output[2] * output[3], [output[0], shape[0], *output[2:]])


def stage_tensors(stage: Stage) -> tuple[Tensor | None, ...]:
    """As the op takes them: known statistics or none, and a 1x1 weight as a matrix."""
    weight = stage.weight.flatten(1) if stage.weight.shape[2:] == (1, 1) else stage.weight
    fixed = (None, None) if stage.training else (stage.running_mean, stage.running_var)
    return weight, stage.bias, stage.bn_weight, stage.bn_bias, *fixed
