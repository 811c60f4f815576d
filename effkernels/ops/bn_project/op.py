"""The end of a block in training: `bn_project`, a differentiable fusion, and its two halves, which `mbconv` shares.

Of the wide convolution before it only the raw output is stored, and of the projection the raw output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Op
from effkernels.ops.batch_norm.op import (
    BN_APPLY,
    BN_BACKWARD,
    BN_BACKWARD_SUMS,
    BN_POOL,
    BN_RESIDUAL,
    Reduce,
    batch_statistics,
    fake_statistics,
    settled,
    statistics_dtype,
)
from effkernels.ops.batch_norm.synchronised import means_of_all
from effkernels.ops.pointwise.op import POINTWISE, POINTWISE_BACKWARD
from effkernels.ops.squeeze_excite.op import SE_GATE, SE_GATE_BACKWARD


def project(
    backend: str, d: Tensor, norm2: tuple[Any, ...],
    v1: Tensor | None, c1: Tensor | None, v2: Tensor | None, c2: Tensor | None, se_act: int, gate_act: int,
    w3: Tensor, bias3: Tensor | None, gamma3: Tensor | None, beta3: Tensor | None,
    mean3: Tensor | None, var3: Tensor | None, eps3: float, group3: str,
    scale: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y, and what backward reads: p, its statistics, `bn_pool`'s sums and the gate, both empty without one."""
    wide = statistics_dtype(d)
    if v1 is None:
        pooled, gate = d.new_empty(0, dtype=wide), d.new_empty(0, dtype=wide)
    else:
        assert v2 is not None
        pooled = BN_POOL(backend, d, *norm2, True)
        gate = SE_GATE(backend, pooled[0], v1, c1, v2, c2, se_act, gate_act)
    bias3 = None if bias3 is None else bias3.to(wide)
    p, stats3 = POINTWISE(backend, d, w3, *norm2, given(gate), bias3, None, reduction(mean3))
    stats3 = settled(stats3, mean3, var3, p, group3)
    norm3 = (stats3[0], stats3[1], gamma3, beta3, eps3)
    if scale is None and residual is None:
        y = BN_APPLY(backend, p, *norm3, 0, Reduce.NONE)[0]
    else:
        y = BN_RESIDUAL(backend, p, *norm3, _per_channel(scale, p), residual)
    return y, p, stats3, pooled, gate


def reduction(mean: Tensor | None) -> Reduce:
    """What is summed of a convolution's output before a BatchNorm with or without a fixed mean."""
    return Reduce.STATISTICS if mean is None else Reduce.NONE


def cast(x: Tensor, *weights: Tensor | None) -> list[Any]:
    """The weights in the dtype of x, which under autocast is not theirs: all by one launch."""
    wide = [w for w in weights if w is not None and w.dtype != x.dtype]
    if not wide:
        return [*weights]
    narrow = [torch.empty_like(w, dtype=x.dtype) for w in wide]
    torch._foreach_copy_(narrow, wide)
    made = iter(narrow)
    return [w if w is None or w.dtype == x.dtype else next(made) for w in weights]


def given(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def _per_channel(scale: Tensor | None, like: Tensor) -> Tensor | None:
    """[N] -> [N, C]"""
    return None if scale is None else scale[:, None].expand(like.shape[:2]).contiguous()


# The arguments whose gradients are this half's own.
OF_PROJECTION = {"w3", "bias3", "gamma3", "beta3"}
OF_GATE = {"gamma2", "beta2", "v1", "c1", "v2", "c2"}


def project_backward(
    backend: str, need: set[str], before: bool, grad: Tensor, d: Tensor, norm2: tuple[Any, ...],
    p: Tensor, stats3: Tensor, fixed3: bool, group3: str, pooled: Tensor, gate: Tensor | None,
    v1: Tensor | None, c1: Tensor | None, v2: Tensor | None, se_act: int, gate_act: int,
    w3: Tensor, gamma3: Tensor | None, beta3: Tensor | None, eps3: float, scale: Tensor | None,
) -> tuple[dict[str, Tensor | None], tuple[Tensor, Tensor | None, Tensor] | None]:  # fmt: skip
    """The gradients in `need`; and, if `before` is, what the half before goes on with.

    That is G, the gradient of act2(bn2(d)) being G * gate + shift; shift; and the sums of dz2 and dz2 * dhat.
    """
    for_d = before or need & OF_GATE
    for_p = for_d or "w3" in need
    grads: dict[str, Tensor | None] = {}
    scale = _per_channel(scale, p)
    norm3 = (stats3[0], stats3[1], gamma3, beta3, eps3)
    means3 = None
    if (for_p and not fixed3) or need & (OF_PROJECTION - {"w3"}):
        sums = BN_BACKWARD_SUMS(backend, grad, scale, None, p, *norm3, 0)
        means3 = None if fixed3 else means_of_all(sums, stats3, p, group3)
        grads |= of_norm("3", need, sums, fixed3, stats3, gamma3, eps3)
    if not for_p:
        return grads, None
    G, sums, grads["w3"] = POINTWISE_BACKWARD(
        backend, grad, scale, p, stats3[0], stats3[1], gamma3, eps3, means3, w3, d, *norm2, gate,
        bool(for_d), "w3" in need,
    )  # fmt: skip
    if not for_d:
        return grads, None

    # BatchNorm's sums of dz2 = (G * gate + shift) * act2'(bn2(d)) come from those of its factors per image.
    if gate is None:
        return grads, (G, None, sums[1:].sum(1))
    assert v1 is not None and v2 is not None
    shift, sums, *of_weights = SE_GATE_BACKWARD(
        backend, sums, gate, pooled, v1, c1, v2, se_act, gate_act, d.shape[2] * d.shape[3]
    )
    grads |= zip(("v1", "c1", "v2", "c2"), of_weights, strict=True)
    return grads, (G, shift, sums)


def of_norm(
    number: str, need: set[str], sums: Tensor, fixed: bool, stats: Tensor, gamma: Tensor | None, eps: float
) -> dict[str, Tensor | None]:
    """Of a BatchNorm's parameters, and of the bias of the convolution before it, which batch statistics cancel."""
    of_beta, of_gamma = sums.unbind()
    grads: dict[str, Tensor | None] = {f"gamma{number}": of_gamma, f"beta{number}": of_beta}
    if (bias := f"bias{number}") in need:
        factor = (stats[1] + eps).rsqrt() if gamma is None else (stats[1] + eps).rsqrt() * gamma
        grads[bias] = of_beta * factor if fixed else torch.zeros_like(of_beta)
    return grads


def backward_by_name(
    inputs: Sequence[str], gradients: Callable[[str, Any, set[str], Tensor], dict[str, Tensor | None]]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of an op with the inputs of these names, from the gradients of those in a set, whatever others."""

    def backward(backend: str, ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(inputs)
        need = {name for name, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed}
        grads = gradients(backend, ctx, need, grad)
        wanted = (grads.get(name) if name in need else None for name in inputs)
        return tuple(
            grad if grad is None or grad.dtype == dtype else grad.to(dtype)
            for grad, dtype in zip(wanted, ctx.dtypes, strict=True)
        )

    return backward


def _forward(
    backend: str, x: Tensor,
    gamma2: Tensor | None, beta2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    v1: Tensor | None, c1: Tensor | None, v2: Tensor | None, c2: Tensor | None,
    w3: Tensor, bias3: Tensor | None, gamma3: Tensor | None, beta3: Tensor | None,
    mean3: Tensor | None, var3: Tensor | None,
    scale: Tensor | None, residual: Tensor | None, groups: Sequence[str], eps: Sequence[float], acts: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    act2, se_act, gate_act = acts
    (w3,) = cast(x, w3)
    stats2 = batch_statistics(backend, x, mean2, var2, groups[0])
    norm2 = (stats2[0], stats2[1], gamma2, beta2, eps[0], act2)
    y, p, stats3, pooled, gate = project(
        backend, x, norm2, v1, c1, v2, c2, se_act, gate_act, w3, bias3, gamma3, beta3, mean3, var3, eps[1], groups[1],
        scale, residual,
    )  # fmt: skip
    return y, p, stats2, stats3, pooled, gate


def _fake(
    x: Tensor,
    gamma2: Tensor | None, beta2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    v1: Tensor | None, c1: Tensor | None, v2: Tensor | None, c2: Tensor | None,
    w3: Tensor, bias3: Tensor | None, gamma3: Tensor | None, beta3: Tensor | None,
    mean3: Tensor | None, var3: Tensor | None,
    scale: Tensor | None, residual: Tensor | None, groups: Sequence[str], eps: Sequence[float], acts: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = statistics_dtype(x)
    p = empty_map(x, (x.shape[0], w3.shape[0], *x.shape[2:]))
    pooled = x.new_empty((0,) if v1 is None else (3, *x.shape[:2]), dtype=wide)
    gate = x.new_empty((0,) if v1 is None else x.shape[:2], dtype=wide)
    return torch.empty_like(p), p, fake_statistics(x, groups[0]), fake_statistics(p, groups[1]), pooled, gate


_INPUTS = (
    "x", "gamma2", "beta2", "mean2", "var2", "v1", "c1", "v2", "c2", "w3", "bias3", "gamma3", "beta3", "mean3", "var3",
    "scale", "residual", "groups", "eps", "acts",
)  # fmt: skip
_SAVED = ("x", "gamma2", "beta2", "v1", "c1", "v2", "w3", "gamma3", "beta3", "scale")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    arguments = dict(zip(_INPUTS, inputs, strict=True))
    ctx.groups, ctx.eps, ctx.acts = inputs[-3:]
    ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs]
    ctx.fixed = tuple(arguments[mean] is not None for mean in ("mean2", "mean3"))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(arguments[name] for name in _SAVED), *output[1:])


def _gradients(backend: str, ctx: Any, need: set[str], grad: Tensor) -> dict[str, Tensor | None]:
    x, gamma2, beta2, v1, c1, v2, w3, gamma3, beta3, scale, p, stats2, stats3, pooled, gate = ctx.saved_tensors
    act2, se_act, gate_act = ctx.acts
    fixed2, fixed3 = ctx.fixed
    eps2, eps3 = ctx.eps
    gate = given(gate)
    (w3,) = cast(x, w3)
    norm2 = (stats2[0], stats2[1], gamma2, beta2, eps2, act2)
    grad = grad.contiguous(memory_format=suggest_memory_format(p))
    grads, rest = project_backward(
        backend, need, "x" in need, grad, x, norm2, p, stats3, fixed3, ctx.groups[1], pooled, gate, v1, c1, v2,
        se_act, gate_act, w3, gamma3, beta3, eps3, scale,
    )  # fmt: skip
    grads["residual"] = grad
    if rest is not None:
        G, shift, sums = rest
        grads |= of_norm("2", need, sums, fixed2, stats2, gamma2, eps2)
        if "x" in need:
            means2 = None if fixed2 else means_of_all(sums, stats2, x, ctx.groups[0])
            grads["x"] = BN_BACKWARD(backend, G, gate, shift, x, *norm2, means2)
    return grads


# y = bn3(w3 (act2(bn2(x)) * gate) + bias3) * scale + residual, where x is the raw output of a convolution; the rest as
# in `mbconv`, of which this is the end: gate, weights, known or batch statistics. groups, eps: of bn2, bn3; acts: act2,
# se_act, gate_act. What backward reads is returned too: p, the raw output of w3, the statistics of x and of p,
# `bn_pool`'s sums and the gate.
BN_PROJECT = Op(
    "bn_project",
    "(Tensor x, Tensor? gamma2, Tensor? beta2, Tensor? mean2, Tensor? var2,"
    " Tensor? v1, Tensor? c1, Tensor? v2, Tensor? c2,"
    " Tensor w3, Tensor? bias3, Tensor? gamma3, Tensor? beta3, Tensor? mean3, Tensor? var3,"
    " Tensor? scale, Tensor? residual, str[] groups, float[] eps, int[] acts)"
    " -> (Tensor y, Tensor p, Tensor stats2, Tensor stats3, Tensor pooled, Tensor gate)",
    borrows=True,
    fake=_fake,
    setup_context=_setup_context,
    backward=backward_by_name(_INPUTS, _gradients),
)
BN_PROJECT.compose(_forward)
