"""The MBConv block in training: `mbconv`, one differentiable fusion of the phases.

Only raw convolution outputs are stored: e, d and p, each with its batch statistics from the pass that writes it. The
next phase normalises and activates on load, forward and again backward. e, the widest, may also exist on chip only.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from effkernels.ops._layout import empty_map
from effkernels.ops._op import Op
from effkernels.ops.batch_norm.op import BN_STATISTICS, Reduce, settled, statistics_dtype
from effkernels.ops.batch_norm.synchronised import count, means_of_all
from effkernels.ops.bn_project.op import backward_by_name, cast, given, of_norm, project, project_backward, reduction
from effkernels.ops.dwconv.op import DWCONV, DWCONV_BACKWARD, NO_NORM
from effkernels.ops.expand_dwconv.op import EXPAND_DWCONV, EXPAND_DWCONV_BACKWARD, EXPAND_DWCONV_GRADIENTS
from effkernels.ops.pointwise.op import POINTWISE, POINTWISE_BACKWARD


class Expanded(IntEnum):
    """What becomes of the expanded map e."""

    KEPT = 0  # from the forward to the backward pass
    COMPUTED_AGAIN = 1  # by the backward pass, in memory
    ON_CHIP = 2  # it is in memory in neither of the passes

    def __str__(self) -> str:
        return f"expanded map {self.name.lower().replace('_', ' ')}"


def _forward(
    backend: str, x: Tensor,
    w1: Tensor | None, bias1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    mean1: Tensor | None, var1: Tensor | None,
    w2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    v1: Tensor | None, c1: Tensor | None, v2: Tensor | None, c2: Tensor | None,
    w3: Tensor, bias3: Tensor | None, gamma3: Tensor | None, beta3: Tensor | None,
    mean3: Tensor | None, var3: Tensor | None,
    scale: Tensor | None, residual: bool, expanded: int, groups: Sequence[str], eps: Sequence[float],
    acts: Sequence[int], window: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    group1, group2, group3 = groups
    eps1, eps2, eps3 = eps
    act1, act2, se_act, gate_act = acts
    stride, *rest = window
    wide = statistics_dtype(x)
    w1, w2, w3 = cast(x, w1, w2, w3)

    bias1 = None if bias1 is None else bias1.to(wide)
    e, stats1, moments = x.new_empty(0), x.new_empty(0, dtype=wide), x.new_empty(0, dtype=wide)
    if w1 is None:
        d, stats2 = DWCONV(backend, x, w2, *NO_NORM, *NO_NORM, stride, *rest, reduction(mean2))
    elif expanded == Expanded.ON_CHIP:
        if mean1 is None:
            moments = moments_of(backend, x)
            stats1 = expanded_statistics(moments, w1, bias1)
        stats1 = settled(stats1, mean1, var1, x, group1)
        norm1 = (_without(bias1, stats1[0]), stats1[1], gamma1, beta1, eps1, act1)
        d, stats2 = EXPAND_DWCONV(backend, x, w1, *norm1, w2, *NO_NORM, stride, *rest, reduction(mean2))
    else:
        e, stats1 = POINTWISE(backend, x, w1, *NO_NORM, None, bias1, None, reduction(mean1))
        stats1 = settled(stats1, mean1, var1, e, group1)
        norm1 = (stats1[0], stats1[1], gamma1, beta1, eps1, act1)
        d, stats2 = DWCONV(backend, e, w2, *norm1, *NO_NORM, stride, *rest, reduction(mean2))
    stats2 = settled(stats2, mean2, var2, d, group2)
    norm2 = (stats2[0], stats2[1], gamma2, beta2, eps2, act2)
    y, p, stats3, pooled, gate = project(
        backend, d, norm2, v1, c1, v2, c2, se_act, gate_act, w3, bias3, gamma3, beta3, mean3, var3, eps3, group3,
        scale, x if residual else None,
    )  # fmt: skip
    return y, e if expanded == Expanded.KEPT else x.new_empty(0), d, p, stats1, stats2, stats3, pooled, gate, moments


def moments_of(backend: str, x: Tensor) -> Tensor:
    """[1 + C, C] of x: its mean, and below it the covariance of its channels, over batch and map."""
    mean = BN_STATISTICS(backend, x)[0]
    centred, drift = _centred(mean), torch.stack([mean, torch.zeros_like(mean)])
    unused = x.new_empty(x.shape[1], x.shape[1])
    # The weight's gradient, where the gradient and the input are both x less its mean.
    *_, products = POINTWISE_BACKWARD(
        backend, x, None, x, *centred[:3], 0.0, drift, unused, x, *centred, None, False, True
    )
    return torch.cat([mean[None], products / count(x)])


def expanded_statistics(moments: Tensor, w1: Tensor, bias1: Tensor | None) -> Tensor:
    """The batch statistics [2, M] of e = w1 x + bias1, from those of x."""
    weight, (mean, covariance) = w1.double(), moments.double().split([1, w1.shape[1]])
    var = ((weight @ covariance) * weight).sum(1).clamp_min(0)
    stats = torch.stack([weight @ mean[0], var]).to(moments.dtype)
    return stats if bias1 is None else torch.stack([stats[0] + bias1, stats[1]])


def _without(bias: Tensor | None, mean: Tensor) -> Tensor:
    """The mean of a map, given that of the map plus `bias`."""
    return mean if bias is None else mean - bias


def _fake(
    x: Tensor,
    w1: Tensor | None, bias1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None,
    mean1: Tensor | None, var1: Tensor | None,
    w2: Tensor, gamma2: Tensor | None, beta2: Tensor | None, mean2: Tensor | None, var2: Tensor | None,
    v1: Tensor | None, c1: Tensor | None, v2: Tensor | None, c2: Tensor | None,
    w3: Tensor, bias3: Tensor | None, gamma3: Tensor | None, beta3: Tensor | None,
    mean3: Tensor | None, var3: Tensor | None,
    scale: Tensor | None, residual: bool, expanded: int, groups: Sequence[str], eps: Sequence[float],
    acts: Sequence[int], window: Sequence[int],
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
        torch.empty_like(p), e if expanded == Expanded.KEPT and w1 is not None else x.new_empty(0), d, p,
        vector(rows1, hidden, given=w1 is not None), vector(rows2, hidden), vector(rows3, out),
        vector(3, n, hidden, given=v1 is not None), vector(n, hidden, given=v1 is not None),
        vector(1 + x.shape[1], x.shape[1], given=expanded == Expanded.ON_CHIP and mean1 is None),
    )  # fmt: skip


_INPUTS = (
    "x", "w1", "bias1", "gamma1", "beta1", "mean1", "var1", "w2", "gamma2", "beta2", "mean2", "var2",
    "v1", "c1", "v2", "c2", "w3", "bias3", "gamma3", "beta3", "mean3", "var3", "scale", "residual", "expanded",
    "groups", "eps", "acts", "window",
)  # fmt: skip
_SAVED = (
    "x", "w1", "bias1", "gamma1", "beta1", "w2", "gamma2", "beta2", "v1", "c1", "v2", "w3", "gamma3", "beta3", "scale",
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = dict(zip(_INPUTS, inputs, strict=True))
    ctx.residual, ctx.expanded, ctx.groups, ctx.eps, ctx.acts, ctx.window = inputs[-6:]
    ctx.dtypes = [t.dtype if isinstance(t, Tensor) else None for t in inputs]
    ctx.fixed = tuple(given[mean] is not None for mean in ("mean1", "mean2", "mean3"))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(given[name] for name in _SAVED), *output[1:])


def _gradients(backend: str, ctx: Any, need: set[str], grad: Tensor) -> dict[str, Tensor | None]:
    saved = ctx.saved_tensors
    x, w1, bias1, gamma1, beta1, w2, gamma2, beta2, v1, c1, v2, w3, gamma3, beta3, scale = saved[: len(_SAVED)]
    e, d, p, stats1, stats2, stats3, pooled, gate, moments = saved[len(_SAVED) :]
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
    bias1 = None if bias1 is None else bias1.to(stats1.dtype)
    if w1 is not None and ctx.expanded == Expanded.ON_CHIP:
        norm1 = (_without(bias1, stats1[0]), stats1[1], gamma1, beta1, eps1, act1)
        centre = None if fixed1 else moments[0]
        dx, grad_w1, grads["w2"], sums = _expand_dwconv_gradients(
            backend, need, bool(for_e), G, gate, shift, d, norm2, means2, w2, x, w1, centre, norm1, ctx.window
        )
        if for_e:
            grads |= of_norm("1", need, sums, fixed1, stats1, gamma1, eps1)
        if not fixed1 and need & {"x", "w1"}:
            means = means_of_all(sums, stats1, x, group1)
            dx, grad_w1 = _without_means(backend, need, dx, grad_w1, norm1, means, w1, x, moments)
        grads["w1"] = grad_w1
    else:
        if w1 is not None and ctx.expanded == Expanded.COMPUTED_AGAIN:
            e, _ = POINTWISE(backend, x, w1, *NO_NORM, None, bias1, None, Reduce.NONE)
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


def _centred(mean: Tensor) -> tuple[Any, ...]:
    """What takes the mean off where a BatchNorm and an activation could be."""
    return mean, torch.ones_like(mean), None, None, 0.0, 0


def _expand_dwconv_gradients(
    backend: str, need: set[str], for_e: bool, G: Tensor, gate: Tensor | None, shift: Tensor | None, d: Tensor,
    norm2: tuple[Any, ...], means2: Tensor | None, w2: Tensor, x: Tensor, w1: Tensor, centre: Tensor | None,
    norm1: tuple[Any, ...], window: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What EXPAND_DWCONV_GRADIENTS returns; of a backend without it, by two launches."""
    stride, top, left, _, _ = window
    needs = "x" in need, "w1" in need
    if backend in EXPAND_DWCONV_GRADIENTS.overloads:
        return EXPAND_DWCONV_GRADIENTS(
            backend, G, gate, shift, d, *norm2, means2, w2, x, w1, centre, *norm1, stride, top, left,
            for_e, *needs, "w2" in need,
        )  # fmt: skip
    dz1, grad_depthwise, sums = EXPAND_DWCONV_BACKWARD(
        backend, G, gate, shift, d, *norm2, means2, w2, x, w1, *norm1, stride, top, left, for_e, "w2" in need
    )
    if not any(needs):
        return x.new_empty(0), x.new_empty(0), grad_depthwise, sums
    mean1, var1, gamma1, _, eps1, _ = norm1
    prologue = NO_NORM if centre is None else _centred(centre)
    grad_x, _, grad_expand = POINTWISE_BACKWARD(
        backend, dz1, None, dz1, mean1, var1, gamma1, eps1, None, w1, x, *prologue, None, *needs
    )
    return grad_x, grad_expand, grad_depthwise, sums


def _without_means(
    backend: str, need: set[str], grad_x: Tensor, grad_weight: Tensor, norm1: tuple[Any, ...], means1: Tensor,
    w1: Tensor, x: Tensor, moments: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and of w1, given them as if the statistics of bn1 were constants.

    The two means that BatchNorm's formula subtracts from the gradient of bn1(e) are of ones and of ehat, which is a
    multiple of w1 times a centred x. So what is subtracted from the gradient of w1 is a product with the covariance of
    x, and from that of x a constant and a product with a [C, C] (docs/algebra.md).
    """
    _, var1, gamma1, _, eps1, _ = norm1
    wide, rstd = w1.double(), (var1.double() + eps1).rsqrt()
    factor = rstd if gamma1 is None else rstd * gamma1
    of_one, of_ehat = means1.double()
    weighted = (factor * rstd * of_ehat)[:, None] * wide
    if "w1" in need:
        grad_weight = grad_weight - (weighted @ moments[1:].double() * count(x)).to(grad_weight.dtype)
    if "x" in need:
        bias = (-(factor * of_one) @ wide).to(moments.dtype)
        matrix = -(wide.T @ weighted).to(x.dtype)
        grad_x, _ = POINTWISE(backend, x, matrix, *_centred(moments[0]), None, bias, grad_x, Reduce.NONE)
    return grad_x, grad_weight


# y = bn3(w3 (act2(bn2(conv(act1(bn1(w1 x + bias1)), w2))) * gate) + bias3) * scale + x, where gate = gate_act(v2
# se_act(v1 q + c1) + c2) with q the mean over the map of act2(bn2(.)). w1 [M, C] or None: no expand; v1 [R, M] or None:
# no gate; w1, w2 and w3 are cast to the dtype of x; scale [N] or None; x is added if `residual`. A BatchNorm with a
# mean and a variance uses them, one without uses batch statistics, those of all processes where its group has a name.
# groups, eps: of bn1, bn2, bn3; acts: act1, act2, se_act, gate_act; window: stride, padding at the top and at the left,
# height and width of the output. What backward reads is returned too: the raw convolution outputs e, d and p (e only if
# it is `Expanded.KEPT`), the statistics [2, channels] of each ([3, channels] of a group), `bn_pool`'s sums, the gate,
# and, where e is on chip, the moments of x; what there is not is empty. e can be on chip where x is in channels_last
# and group1 has no name.
MBCONV = Op(
    "mbconv",
    "(Tensor x,"
    " Tensor? w1, Tensor? bias1, Tensor? gamma1, Tensor? beta1, Tensor? mean1, Tensor? var1,"
    " Tensor w2, Tensor? gamma2, Tensor? beta2, Tensor? mean2, Tensor? var2,"
    " Tensor? v1, Tensor? c1, Tensor? v2, Tensor? c2,"
    " Tensor w3, Tensor? bias3, Tensor? gamma3, Tensor? beta3, Tensor? mean3, Tensor? var3,"
    " Tensor? scale, bool residual, int expanded, str[] groups, float[] eps, int[] acts, SymInt[] window)"
    " -> (Tensor y, Tensor e, Tensor d, Tensor p, Tensor stats1, Tensor stats2, Tensor stats3, Tensor pooled,"
    " Tensor gate, Tensor moments)",
    borrows=True,
    fake=_fake,
    setup_context=_setup_context,
    backward=backward_by_name(_INPUTS, _gradients),
)
MBCONV.compose(_forward)
