"""Squeeze-excite (arXiv:1709.01507): scale each channel by a gate computed from all channels' means."""

from torch import Tensor

from effkernels import backends
from effkernels.ops import _checks
from effkernels.ops._activation import ACTIVATIONS, GATES
from effkernels.ops.batch_norm.op import statistics_dtype
from effkernels.ops.squeeze_excite import op, reference


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "silu",
    gate: str = "sigmoid",
    pooled: Tensor | None = None,
) -> Tensor:
    """Squeeze-excite: `x * squeeze_excite_gate(x, ...)[:, :, None, None]`.

    Equivalent to `x * torch.sigmoid(expand(F.silu(reduce(x.mean((2, 3), keepdim=True)))))` with two 1x1 convolutions.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or (cpp, eager) float64; NCHW or channels_last, slices too.
        reduce_weight, reduce_bias: [R, C, 1, 1] or [R, C], and [R] or None; float32 or the dtype of x.
        expand_weight, expand_bias: [C, R, 1, 1] or [C, R], and [C] or None; the dtype of reduce_weight.
        activation: between the layers: "silu", "relu", "relu6", "hardswish" or "identity".
        gate: "sigmoid" or "hardsigmoid".
        pooled: the mean of x over its map if it is known, [N, C] in float32 (float64 for float64), as
            `dwconv_bn_swish(..., return_pooled=True)` gives it: saves a pass over x.

    Returns:
        [N, C, H, W], the dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by `use_backend` cannot run.
    """
    weights, codes = _arguments(
        "squeeze_excite", x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate, pooled
    )
    backend = backends.choose("squeeze_excite", x)
    if backend == "eager":
        return reference.scale(x, reference.se_gate(x, pooled, *weights, *codes))
    y: Tensor = op.SQUEEZE_EXCITE(backend, x, pooled, *weights, *codes)[0]
    return y


def squeeze_excite_gate(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "silu",
    gate: str = "sigmoid",
    pooled: Tensor | None = None,
) -> Tensor:
    """The gate of `squeeze_excite` alone, [N, C] in float32 (float64 for float64). Arguments and errors as there."""
    weights, codes = _arguments(
        "squeeze_excite_gate", x, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate, pooled
    )
    backend = backends.choose("squeeze_excite_gate", x)
    if backend == "eager":
        return reference.se_gate(x, pooled, *weights, *codes)
    gate_values: Tensor = op.SE_GATE(
        backend, op.SPATIAL_MEAN(backend, x) if pooled is None else pooled, *weights, *codes
    )
    return gate_values


def _arguments(
    name: str,
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate: str,
    pooled: Tensor | None,
) -> tuple[tuple[Tensor, Tensor | None, Tensor, Tensor | None], tuple[int, int]]:
    """The checked weights, as matrices, and the codes of activation and gate."""
    _checks.map_tensor(name, "x", x)
    channels = x.shape[1]
    reduce_weight = _matrix(name, "reduce_weight", "[R, C]", reduce_weight)
    expand_weight = _matrix(name, "expand_weight", "[C, R]", expand_weight)
    reduced = reduce_weight.shape[0]
    _checks.shaped(name, "reduce_weight", reduce_weight, [reduced, channels], x)
    _checks.shaped(name, "reduce_bias", reduce_bias, [reduced], x)
    _checks.shaped(name, "expand_weight", expand_weight, [channels, reduced], x)
    _checks.shaped(name, "expand_bias", expand_bias, [channels], x)
    _checks.shaped(name, "pooled", pooled, x.shape[:2], x)
    _checks.parameter_dtype(name, "reduce_weight", reduce_weight, x)
    others = dict(reduce_bias=reduce_bias, expand_weight=expand_weight, expand_bias=expand_bias)
    for other, tensor in others.items():
        if tensor is not None:
            _checks.same_dtype(name, other, tensor, "reduce_weight", reduce_weight)
    wide = statistics_dtype(x)
    if pooled is not None and pooled.dtype != wide:
        raise TypeError(f"{name}: pooled must be {wide}, got {pooled.dtype}")
    codes = (
        _checks.code(name, "activation", activation, ACTIVATIONS),
        _checks.code(name, "gate", gate, GATES),
    )
    return (reduce_weight, reduce_bias, expand_weight, expand_bias), codes


def _matrix(name: str, argument: str, form: str, weight: Tensor) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name}: {argument} must be a tensor {form} or {form[:-1]}, 1, 1], got {type(weight).__name__}"
        )
    if weight.dim() == 4 and weight.shape[2:] == (1, 1):
        return weight.flatten(1)
    if weight.dim() != 2:
        raise ValueError(f"{name}: {argument} must be {form} or {form[:-1]}, 1, 1], got {list(weight.shape)}")
    return weight
