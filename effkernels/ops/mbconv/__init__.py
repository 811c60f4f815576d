"""The MBConv block in training, in one op."""

from torch import Tensor
from torch._prims_common import is_channels_last_contiguous

from effkernels import backends
from effkernels.ops import _checks
from effkernels.ops._activation import ACTIVATIONS, GATES
from effkernels.ops._geometry import resolve_padding
from effkernels.ops.batch_norm import Running, update_running_statistics
from effkernels.ops.batch_norm.op import statistics_dtype
from effkernels.ops.batch_norm.synchronised import group_name
from effkernels.ops.bn_project import Stage, check_stage, matrices, stage_tensors
from effkernels.ops.dwconv import KERNEL_SIZES, STRIDES
from effkernels.ops.expand_dwconv.op import EXPAND_DWCONV_GRADIENTS, fits
from effkernels.ops.mbconv import op, reference
from effkernels.ops.mbconv_inference import Gate

_NAME = "mbconv"
MEMORY = ("default", "minimal")


def mbconv(
    x: Tensor,
    expand: Stage | None,
    depthwise: Stage,
    squeeze_excite: Gate | None,
    project: Stage,
    *,
    stride: int = 1,
    padding: int | str = "auto",
    scale: Tensor | None = None,
    residual: bool = False,
    memory: str = "default",
) -> Tensor:
    """An MBConv block (arXiv:1905.11946) for training: `project(squeeze_excite(depthwise(expand(x)))) * scale + x`.

    Saved for backward are x, the three raw convolution outputs, and vectors; what lies between them is computed again
    on load.

    Args:
        x: [N, C, H, W], N > 0; float32, float16, bfloat16 or (cpp, eager) float64; NCHW or channels_last, slices too.
        expand: 1x1, weight [M, C, 1, 1]; None: M is C.
        depthwise: weight [M, 1, k, k], k in 3, 5, 7; no bias.
        squeeze_excite: reduce_weight [R, M, 1, 1], expand_weight [M, R, 1, 1]; float32 or the dtype of x; None: none.
        project: 1x1, weight [O, M, 1, 1]; activation "identity".
            Convolution weights have the dtype of x. Under autocast they and x are cast as `F.conv2d` casts them.
        stride, padding: of the depthwise convolution, as for `dwconv_bn_swish`.
        scale: [N], what stochastic depth multiplies each image of the branch by.
        residual: whether x is added, which then has the shape of the output.
        memory: of the expand convolution's output, the widest map: "minimal" does not keep it for backward, "default"
            does. A static rule (`where_expanded`; `effkernels.explain` tells) says which blocks have it on chip only,
            in both passes, by either of them; in others "minimal" computes it again, to the same bits.

    Returns:
        [N, O, Ho, Wo] in the dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or batch statistics would be of
            a single value per channel.
        RuntimeError: the backend asked for by `use_backend` cannot run, or is "eager" and there is a process group.
    """
    _checks.map_tensor(_NAME, "x", x)
    check_memory(_NAME, memory)
    dtype = _checks.autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)  # and the op the weights, whose gradients are not rounded then
    (n, channels), hidden, out = x.shape[:2], depthwise.weight.shape[0], project.weight.shape[0]
    k = depthwise.weight.shape[-1]
    if k not in KERNEL_SIZES:
        raise ValueError(f"{_NAME}: depthwise must have a kernel size in {KERNEL_SIZES}, got {k}")
    if stride not in STRIDES:
        raise ValueError(f"{_NAME}: stride must be one of {STRIDES}, got {stride!r}")
    pad_top, out_h = resolve_padding(_NAME, padding, x.shape[2], k, stride)
    pad_left, out_w = resolve_padding(_NAME, padding, x.shape[3], k, stride)
    window = (stride, pad_top, pad_left, out_h, out_w)
    if expand is not None:
        check_stage(_NAME, "expand", expand, x, (hidden, channels, 1, 1), x.shape)
    check_stage(_NAME, "depthwise", depthwise, x, (hidden if expand else channels, 1, k, k), (n, 1, out_h, out_w))
    check_stage(_NAME, "project", project, x, (out, hidden, 1, 1), (n, 1, out_h, out_w))
    if depthwise.bias is not None or project.activation != "identity":
        raise ValueError(f"{_NAME}: depthwise must have no bias and project no activation")
    if residual and x.shape != (n, out, out_h, out_w):
        raise ValueError(f"{_NAME}: residual needs an output like x, {list(x.shape)}, got {[n, out, out_h, out_w]}")
    _checks.shaped(_NAME, "scale", scale, [n], x)

    backend = backends.choose(_NAME, x, among=op.MBCONV.kernels)
    stages = (expand, depthwise, project)
    groups = [group_name(_NAME, s.process_group if s and s.training else None, backend) for s in stages]
    if backend == "eager":
        return reference.mbconv(x, expand, depthwise, squeeze_excite, project, window, scale, residual)
    expanded = op.Expanded.KEPT
    if expand is not None:
        expanded = where_expanded(backend, x, expand, k, stride, memory)
        backends.remark(str(expanded))
    acts = [ACTIVATIONS[stage.activation] if stage else 0 for stage in (expand, depthwise)]
    weights: tuple[Tensor | None, ...] = (None,) * 4
    if squeeze_excite is not None:
        weights = matrices(squeeze_excite)
        acts += ACTIVATIONS[squeeze_excite.activation], GATES[squeeze_excite.gate]
    y, *_, stats1, stats2, stats3, _, _, _ = op.MBCONV(
        backend,
        x,
        *((None,) * 6 if expand is None else stage_tensors(expand)),
        *(t for i, t in enumerate(stage_tensors(depthwise)) if i != 1),  # has no bias
        *weights,
        *stage_tensors(project),
        None if scale is None else scale.to(statistics_dtype(x)),
        residual,
        expanded,
        groups,
        [stage.eps if stage else 0.0 for stage in stages],
        acts + [0] * (4 - len(acts)),
        window,
    )
    counts = (n * x.shape[2] * x.shape[3], n * out_h * out_w, n * out_h * out_w)
    update_running_statistics(
        *(
            Running(stage.running_mean, stage.running_var, stats, count, stage.momentum)
            for stage, stats, count in zip(stages, (stats1, stats2, stats3), counts, strict=True)
            if stage is not None and stage.training
        )
    )
    return y


# On the CPU. Up to so many channels of x, to expand it in both passes takes less time than to store and load what it
# expands to: measured (docs/training.md).
CHANNELS_ON_CHIP = 32


def where_expanded(backend: str, x: Tensor, expand: Stage, kernel_size: int, stride: int, memory: str) -> op.Expanded:
    """The static rule: by the backend, the layout, the channels, the window and the BatchNorm."""
    # Statistics of all processes are those of e.
    possible = is_channels_last_contiguous(x) and not (expand.training and expand.process_group)
    if backend == "cuda":  # which is not timed on a GPU yet: to save memory only
        on_chip = memory == "minimal" and fits(x.device, x.dtype, expand.weight.shape[1], kernel_size, stride)
    else:
        on_chip = backend in EXPAND_DWCONV_GRADIENTS.overloads and x.shape[1] <= CHANNELS_ON_CHIP
    if possible and on_chip:
        return op.Expanded.ON_CHIP
    return op.Expanded.KEPT if memory == "default" else op.Expanded.COMPUTED_AGAIN


def check_memory(name: str, memory: str) -> None:
    if memory not in MEMORY:
        raise ValueError(f"{name}: memory must be one of {', '.join(MEMORY)}, got {memory!r}")
