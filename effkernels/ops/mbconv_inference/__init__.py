"""A whole MBConv block in one op: inference only, no gradients."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from effkernels import backends
from effkernels.ops import _checks
from effkernels.ops._activation import ACTIVATIONS, GATES
from effkernels.ops._geometry import resolve_padding
from effkernels.ops.conv_inference import Convolution
from effkernels.ops.dwconv import KERNEL_SIZES, STRIDES
from effkernels.ops.mbconv_inference import op, reference

_NAME = "mbconv_inference"
_NO_EXPAND: tuple[Any, ...] = (None, None, None, None, None, 0.0, 0)
_NO_GATE = (None, None, None, None, 0, 0)


class Gate(NamedTuple):
    """Squeeze-excite's two layers: [R, hidden, 1, 1], [R] or None, [hidden, R, 1, 1], [hidden] or None."""

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    activation: str
    gate: str


@dataclass(frozen=True)
class PackedBlock:
    """The weights of a block, rearranged for the CPU that this process runs on, and what else its op needs."""

    weights: Tensor
    sizes: tuple[Any, ...]  # hidden ... gate of the op's schema
    stride: int
    padding: int | str

    def __call__(self, x: Tensor, residual: bool) -> Tensor:
        window = _window(x, self.sizes[3], self.stride, self.padding)
        y: Tensor = op.MBCONV_PACKED("cpp", x, self.weights, *self.sizes, *window, residual)
        return y


def mbconv_inference(
    x: Tensor,
    expand: Convolution | None,
    depthwise: Convolution,
    gate: Gate | None,
    project: Convolution,
    *,
    stride: int = 1,
    padding: int | str = "auto",
    residual: bool = False,
) -> Tensor:
    """MBConv with known statistics (arXiv:1905.11946): `project(se(depthwise(expand(x))))`, plus x if `residual`.

    The expanded map never reaches memory, but for very wide blocks on a GPU. BatchNorms are folded at each call: a
    changed weight changes the next output.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64; NCHW or channels_last, slices too.
        expand: [hidden, C, 1, 1]; None: hidden is C and x is convolved as it is.
        depthwise: [hidden, 1, k, k], k in 3, 5, 7.
        gate: squeeze-excite's layers, or None.
        project: [out, hidden, 1, 1]; its activation must be "identity".
        stride, padding: of the depthwise convolution, as for `dwconv_bn_swish`.

    Convolutions have the dtype of x (under autocast both are cast), norms and gate that or float32.

    Returns:
        [N, out, Ho, Wo] in the dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by `use_backend` cannot run, or has no such kernel.
    """
    _checks.map_tensor(_NAME, "x", x)
    dtype = _checks.autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        expand = None if expand is None else expand._replace(weight=expand.weight.to(dtype))
        depthwise = depthwise._replace(weight=depthwise.weight.to(dtype))
        project = project._replace(weight=project.weight.to(dtype))
    block = _block(x, expand, depthwise, gate, project)
    channels = (depthwise if expand is None else expand).weight.shape[0 if expand is None else 1]
    if x.shape[1] != channels:
        raise ValueError(f"{_NAME}: x must have {channels} channels, as the weights, got shape {list(x.shape)}")
    if stride not in STRIDES:
        raise ValueError(f"{_NAME}: stride must be one of {STRIDES}, got {stride!r}")
    window = _window(x, depthwise.weight.shape[2], stride, padding)
    output = [project.weight.shape[0], *window[3:]]
    if residual and output != list(x.shape[1:]):
        raise ValueError(f"{_NAME}: residual needs an output of the shape of x, {list(x.shape[1:])}, got {output}")
    backend = backends.choose(_NAME, x, among=op.MBCONV_INFERENCE.kernels)
    if backend == "eager":
        return reference.mbconv_inference(x, expand, depthwise, gate, project, window, residual)
    y: Tensor = op.MBCONV_INFERENCE(backend, x, *block, *window, residual)
    return y


def pack_block(
    expand: Convolution | None,
    depthwise: Convolution,
    gate: Gate | None,
    project: Convolution,
    *,
    stride: int = 1,
    padding: int | str = "auto",
) -> PackedBlock:
    """The same block with its weights rearranged once, for many calls on this CPU."""
    weights = _block(depthwise.weight, expand, depthwise, gate, project)
    sizes = (
        depthwise.weight.shape[0],
        project.weight.shape[0],
        expand is not None,
        depthwise.weight.shape[2],
        weights[6],
        weights[13],
        0 if gate is None else gate.reduce_weight.shape[0],
        *weights[18:20],
    )
    return PackedBlock(op.MBCONV_PACK("cpp", *weights), sizes, stride, padding)


def _window(x: Tensor, kernel_size: int, stride: int, padding: int | str) -> tuple[int, int, int, int, int]:
    pad_top, out_h = resolve_padding(_NAME, padding, x.shape[2], kernel_size, stride)
    pad_left, out_w = resolve_padding(_NAME, padding, x.shape[3], kernel_size, stride)
    return stride, pad_top, pad_left, out_h, out_w


def _block(
    x: Tensor, expand: Convolution | None, depthwise: Convolution, gate: Gate | None, project: Convolution
) -> tuple[Any, ...]:
    """The block, checked for maps of the dtype and device of `x`, as the op's schema has it."""
    weight = depthwise.weight
    if weight.dim() != 4 or weight.shape[2] not in KERNEL_SIZES:
        raise ValueError(
            f"{_NAME}: depthwise.weight must be [hidden, 1, k, k] with k in {KERNEL_SIZES}, got {list(weight.shape)}"
        )
    hidden, k, out = weight.shape[0], weight.shape[2], project.weight.shape[0]
    if project.norm.activation != "identity":
        raise ValueError(f"{_NAME}: project.norm.activation must be 'identity', got {project.norm.activation!r}")
    arguments = _NO_EXPAND
    if expand is not None:
        arguments = _convolution("expand", x, expand, [hidden, expand.weight.shape[1], 1, 1])
    arguments += _convolution("depthwise", x, depthwise, [hidden, 1, k, k])
    if gate is None:
        arguments += _NO_GATE
    else:
        reduced = gate.reduce_weight.shape[0]
        shapes = ([reduced, hidden, 1, 1], [reduced], [hidden, reduced, 1, 1], [hidden])
        for name, tensor, shape in zip(gate._fields, gate[:4], shapes, strict=False):
            _checks.shaped(_NAME, f"gate.{name}", tensor, shape, x)
            if tensor is not None:
                _checks.same_dtype(_NAME, f"gate.{name}", tensor, "gate.reduce_weight", gate.reduce_weight)
        _checks.parameter_dtype(_NAME, "gate.reduce_weight", gate.reduce_weight, x)
        arguments += (
            *gate[:4],
            _checks.code(_NAME, "gate.activation", gate.activation, ACTIVATIONS),
            _checks.code(_NAME, "gate.gate", gate.gate, GATES),
        )
    return arguments + _convolution("project", x, project, [out, hidden, 1, 1])[:-1]


def _convolution(name: str, x: Tensor, convolution: Convolution, shape: list[int]) -> tuple[Any, ...]:
    weight, norm = convolution
    _checks.shaped(_NAME, f"{name}.weight", weight, shape, x)
    _checks.same_dtype(_NAME, f"{name}.weight", weight, "x", x)
    _checks.batch_norm(_NAME, x, shape[0], norm.weight, norm.bias, norm.running_mean, norm.running_var, False)
    return weight, *norm[:5], _checks.code(_NAME, f"{name}.norm.activation", norm.activation, ACTIVATIONS)
