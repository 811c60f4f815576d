"""The MBConv block in training: `mbconv`, one differentiable fusion of the phases.

Only raw convolution outputs are stored: e, d and p, each with its batch statistics from the pass that writes it. The
next phase normalises and activates on load, forward and again backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Op
from effkernels.ops.batch_norm.op import Reduce, settled, statistics_dtype
from effkernels.ops.batch_norm.synchronised import means_of_all
from effkernels.ops.bn_project.op import backward_by_name, cast, given, of_norm, project, project_backward, reduction
from effkernels.ops.dwconv.op import DWCONV, DWCONV_BACKWARD, NO_NORM
from effkernels.ops.pointwise.op import POINTWISE, POINTWISE_BACKWARD


def _forward(
    backend: str, x: Tensor,
    w1: Tensor | None, bias1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    mean1: Tensor | None, var1: Tensor | None,
    w2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    v1: Tensor | None, c1: Tensor | None, v2: Tensor | None, c2: Tensor | None,
    w3: Tensor, bias3: Tensor | None, gamma3: Tensor | None, beta3: Tensor | None,
    mean3: Tensor | None, var3: Tensor | None,
    scale: Tensor | None, residual: bool, keep: bool, groups: Sequence[str], eps: Sequence[float], acts: Sequence[int],
    window: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    group1, group2, group3 = groups
    eps1, eps2, eps3 = eps
    act1, act2, se_act, gate_act = acts
    stride, *rest = window
    wide = statistics_dtype(x)
    w1, w2, w3 = cast(x, w1, w2, w3)

    prologue: tuple[Any, ...] = NO_NORM
    if w1 is None:
        e, stats1 = x.new_empty(0), x.new_empty(0, dtype=wide)
        d, stats2 = DWCONV(backend, x, w2, *NO_NORM, *NO_NORM, stride, *rest, reduction(mean2))
    else:
        bias1 = None if bias1 is None else bias1.to(wide)
        e, stats1 = POINTWISE(backend, x, w1, *NO_NORM, None, bias1, None, reduction(mean1))
        stats1 = settled(stats1, mean1, var1, e, group1)
        prologue = (stats1[0], stats1[1], gamma1, beta1, eps1, act1)
        d, stats2 = DWCONV(backend, e, w2, *prologue, *NO_NORM, stride, *rest, reduction(mean2))
    stats2 = settled(stats2, mean2, var2, d, group2)
    norm2 = (stats2[0], stats2[1], gamma2, beta2, eps2, act2)
    y, p, stats3, pooled, gate = project(
        backend, d, norm2, v1, c1, v2, c2, se_act, gate_act, w3, bias3, gamma3, beta3, mean3, var3, eps3, group3,
        scale, x if residual else None,
    )  # fmt: skip
    return y, e if keep else x.new_empty(0), d, p, stats1, stats2, stats3, pooled, gate


def _fake(
    x: Tensor,
    w1: Tensor | None, bias1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    mean1: Tensor | None, var1: Tensor | None,
    w2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    v1: Tensor | None, c1: Tensor | None, v2: Tensor | None, c2: Tensor | None,
    w3: Tensor, bias3: Tensor | None, gamma3: Tensor | None, beta3: Tensor | None,
    mean3: Tensor | None, var3: Tensor | None,
    scale: Tensor | None, residual: bool, keep: bool, groups: Sequence[str], eps: Sequence[float], acts: Sequence[int],
    window: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    n, hidden, out = x.shape[0], w2.shape[0], w3.shape[0]
    wide = statistics_dtype(x)
    rows1, rows2, rows3 = (3 if group else 2 for group in groups)

    def vector(*shape: int, given: bool = True) -> Tensor:
        return x.new_empty(shape if given else (0,), dtype=wide)

    e = x if w1 is None else empty_map(x, (n, hidden, *x.shape[2:]))
    d = empty_map(e, (n, hidden, *window[3:]))
    p = empty_map(d, (n, out, *window[3:]))
    return (
        torch.empty_like(p), e if keep and w1 is not None else x.new_empty(0), d, p,
        vector(rows1, hidden, given=w1 is not None), vector(rows2, hidden), vector(rows3, out),
        vector(3, n, hidden, given=v1 is not None), vector(n, hidden, given=v1 is not None),
    )  # fmt: skip


_INPUTS = (
    "x", "w1", "bias1", "gamma1", "beta1", "mean1", "var1", "w2", "gamma2", "beta2", "mean2", "var2",
    "v1", "c1", "v2", "c2", "w3", "bias3", "gamma3", "beta3", "mean3", "var3", "scale", "residual", "keep", "groups",
    "eps", "acts", "window",
)  # fmt: skip
_SAVED = (
    "x", "w1", "bias1", "gamma1", "beta1", "w2", "gamma2", "beta2", "v1", "c1", "v2", "w3", "gamma3", "beta3", "scale",
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = dict(zip(_INPUTS, inputs, strict=True))
    ctx.residual, ctx.keep, ctx.groups, ctx.eps, ctx.acts, ctx.window = inputs[-6:]
    ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs]
    ctx.fixed = tuple(given[mean] is not None for mean in ("mean1", "mean2", "mean3"))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(given[name] for name in _SAVED), *output[1:])


def _gradients(backend: str, ctx: Any, need: set[str], grad: Tensor) -> dict[str, Tensor | None]:
    saved = ctx.saved_tensors
    x, w1, bias1, gamma1, beta1, w2, gamma2, beta2, v1, c1, v2, w3, gamma3, beta3, scale = saved[: len(_SAVED)]
    e, d, p, stats1, stats2, stats3, pooled, gate = saved[len(_SAVED) :]
    eps1, eps2, eps3 = ctx.eps
    act1, act2, se_act, gate_act = ctx.acts
    fixed1, fixed2, fixed3 = ctx.fixed
    group1, group2, group3 = ctx.groups
    w1, w2, w3 = cast(x, w1, w2, w3)

    for_e = need & {"x", "w1", "bias1", "gamma1", "beta1"}
    for_conv = for_e or need & {"w2"}
    grad = grad.contiguous(memory_format=suggest_memory_format(p))
    norm2 = (stats2[0], stats2[1], gamma2, beta2, eps2, act2)
    gate = given(gate)
    grads, rest = project_backward(
        backend, need, bool(for_conv), grad, d, norm2, p, stats3, fixed3, group3, pooled, gate, v1, c1, v2,
        se_act, gate_act, w3, gamma3, beta3, eps3, scale,
    )  # fmt: skip
    if rest is None:
        return grads
    G, shift, sums = rest
    grads |= of_norm("2", need, sums, fixed2, stats2, gamma2, eps2)
    if not for_conv:
        return grads

    means2 = None if fixed2 else means_of_all(sums, stats2, d, group2)
    if w1 is not None and not ctx.keep:
        wide_bias = None if bias1 is None else bias1.to(stats1.dtype)
        e, _ = POINTWISE(backend, x, w1, *NO_NORM, None, wide_bias, None, Reduce.NONE)
    source, prologue = (x, NO_NORM) if w1 is None else (e, (stats1[0], stats1[1], gamma1, beta1, eps1, act1))
    stride, top, left, _, _ = ctx.window
    dz1, grads["w2"], sums = DWCONV_BACKWARD(
        backend, G, gate, shift, d, *norm2, means2, w2, source, *prologue, stride, top, left,
        bool(for_e), "w2" in need,
    )  # fmt: skip
    dx = dz1
    if w1 is not None and for_e:
        grads |= of_norm("1", need, sums, fixed1, stats1, gamma1, eps1)
        if not need & {"x", "w1"}:
            return grads
        means1 = None if fixed1 else means_of_all(sums, stats1, e, group1)
        dx, _, grads["w1"] = POINTWISE_BACKWARD(
            backend, dz1, None, e, stats1[0], stats1[1], gamma1, eps1, means1, w1,
            x, *NO_NORM, None, "x" in need, "w1" in need,
        )  # fmt: skip
    if "x" in need:
        grads["x"] = dx.add_(grad) if ctx.residual else dx
    return grads


# y = bn3(w3 (act2(bn2(conv(act1(bn1(w1 x + bias1)), w2))) * gate) + bias3) * scale + x, where gate = gate_act(v2
# se_act(v1 q + c1) + c2) with q the mean over the map of act2(bn2(.)). w1 [M, C] or None: no expand; v1 [R, M] or None:
# no gate; w1, w2 and w3 are cast to the dtype of x; scale [N] or None; x is added if `residual`. A BatchNorm with a
# mean and a variance uses them, one without uses batch statistics, those of all processes where its group has a name.
# groups, eps: of bn1, bn2, bn3; acts: act1, act2, se_act, gate_act; window: stride, padding at the top and at the left,
# height and width of the output. What backward reads is returned too: the raw convolution outputs e, d and p (e only to
# `keep` it; else it is computed again), the statistics [2, channels] of each ([3, channels] of a group), `bn_pool`'s
# sums and the gate; what there is not is empty.
MBCONV = Op(
    "mbconv",
    "(Tensor x,"
    " Tensor? w1, Tensor? bias1, Tensor? gamma1, Tensor? beta1, Tensor? mean1, Tensor? var1,"
    " Tensor w2, Tensor? gamma2, Tensor? beta2, Tensor? mean2, Tensor? var2,"
    " Tensor? v1, Tensor? c1, Tensor? v2, Tensor? c2,"
    " Tensor w3, Tensor? bias3, Tensor? gamma3, Tensor? beta3, Tensor? mean3, Tensor? var3,"
    " Tensor? scale, bool residual, bool keep, str[] groups, float[] eps, int[] acts, SymInt[] window)"
    " -> (Tensor y, Tensor e, Tensor d, Tensor p, Tensor stats1, Tensor stats2, Tensor stats3, Tensor pooled,"
    " Tensor gate)",
    borrows=True,
    fake=_fake,
    setup_context=_setup_context,
    backward=backward_by_name(_INPUTS, _gradients),
)
MBCONV.compose(_forward)
