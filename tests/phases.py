"""The phase ops of a backend held against plain PyTorch, in float64 and in the same dtype."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tolerance import assert_close_to_reference
from torch import Tensor

from effkernels.ops._activation import activate
from effkernels.ops._geometry import extra_padding, resolve_padding
from effkernels.ops._layout import empty_map
from effkernels.ops.batch_norm import op as batch_norm
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv import op as dwconv
from effkernels.ops.squeeze_excite import op as squeeze_excite

Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, int]


def feature_map(shape: Sequence[int], dtype: torch.dtype = torch.float32, layout: str = "nchw") -> Tensor:
    """Random values; `layout` is nchw or channels_last, and with "sliced " before it a slice of a larger tensor."""
    n, c, h, w = shape
    sliced = layout.startswith("sliced ")
    x = torch.randn((n, c + 3, h + 2, w + 1) if sliced else (n, c, h, w)).to(dtype)
    if layout.endswith("channels_last"):
        x = x.to(memory_format=torch.channels_last)
    return x[:, 1:-2, 1:-1, 1:] if sliced else x


def norm(channels: int, act: int = 0, dtype: torch.dtype = torch.float32, affine: bool = True) -> Norm:
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    gamma, beta = (torch.randn(channels) + 1, torch.randn(channels)) if affine else (None, None)
    return *(None if t is None else t.to(dtype) for t in (mean, var, gamma, beta)), 1e-3, act  # type: ignore[return-value]


def norm_act(x: Tensor, norm: Norm) -> Tensor:
    mean, var, gamma, beta, eps, act = norm
    if mean is not None:
        x = F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps)
    return activate(x, act)


def as_float64(*values):
    return [v.double() if isinstance(v, Tensor) else v for v in values]


def wide(x: Tensor) -> torch.dtype:
    """Of sums over x."""
    return torch.promote_types(x.dtype, torch.float32)


def check_dwconv(
    backend: str, x: Tensor, weight: Tensor, norm1: Norm, norm2: Norm, stride: int, padding: int | str, reduce: int
) -> tuple[Tensor, Tensor]:
    k = weight.shape[2]
    top, out_h = resolve_padding("dwconv", padding, x.shape[2], k, stride)
    left, out_w = resolve_padding("dwconv", padding, x.shape[3], k, stride)

    def eager(x: Tensor, weight: Tensor, norm1: Norm, norm2: Norm) -> Tensor:
        bottom = extra_padding(x.shape[2], out_h, top, k, stride)
        right = extra_padding(x.shape[3], out_w, left, k, stride)
        padded = F.pad(norm_act(x, norm1), (left, left + right, top, top + bottom))
        return norm_act(F.conv2d(padded, weight, None, stride, groups=x.shape[1]), norm2)

    y, sums = dwconv.DWCONV(backend, x, weight, *norm1, *norm2, stride, top, left, out_h, out_w, reduce)
    expected = eager(x, weight, norm1, norm2)
    reference = eager(x.double(), weight.double(), as_float64(*norm1), as_float64(*norm2))
    assert_close_to_reference(y, expected, reference)
    assert y.stride() == empty_map(x, y.shape).stride()
    check_sums(sums, y, reduce)
    return y, sums


def check_sums(sums: Tensor, y: Tensor, reduce: int) -> None:
    """`sums` are those of `y` as stored."""
    if reduce == Reduce.NONE:
        assert sums.numel() == 0
    elif reduce == Reduce.MEAN:
        assert_close_to_reference(sums, y.mean((2, 3), dtype=wide(y)), y.double().mean((2, 3)))
    else:
        check_statistics(sums, y)


def check_statistics(stats: Tensor, y: Tensor) -> None:
    if y.numel() == 0:
        assert stats.isnan().all()
        return
    (eager_var, eager_mean), (var, mean) = (
        torch.var_mean(v, (0, 2, 3), correction=0) for v in (y.to(wide(y)), y.double())
    )
    assert_close_to_reference(stats[1], eager_var, var)
    # A mean near zero is as exact as the deviation allows.
    got, eager, exact = (
        torch.stack([m, v.sqrt()]) for m, v in ((stats[0], stats[1]), (eager_mean, eager_var), (mean, var))
    )
    assert_close_to_reference(got, eager, exact)


def check_bn_statistics(backend: str, x: Tensor) -> Tensor:
    stats = batch_norm.BN_STATISTICS(backend, x)
    check_statistics(stats, x)
    return stats


def check_bn_apply(backend: str, x: Tensor, norm: Norm, reduce: int) -> Tensor:
    y, sums = batch_norm.BN_APPLY(backend, x, *norm, reduce)
    assert_close_to_reference(y, norm_act(x, norm), norm_act(x.double(), as_float64(*norm)))
    assert y.stride() == empty_map(x, y.shape).stride()
    check_sums(sums, y, reduce)
    return y


def check_spatial_mean(backend: str, x: Tensor) -> Tensor:
    mean = squeeze_excite.SPATIAL_MEAN(backend, x)
    check_sums(mean, x, Reduce.MEAN)
    return mean


def check_se_gate(backend: str, pooled: Tensor, weights: list[Tensor | None], act: int, gate: int) -> Tensor:
    def eager(pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        return activate(F.linear(activate(F.linear(pooled, w1, b1), act), w2, b2), gate)

    g = squeeze_excite.SE_GATE(backend, pooled, *weights, act, gate)
    wide_weights = [None if w is None else w.to(pooled.dtype) for w in weights]
    assert_close_to_reference(g, eager(pooled, *wide_weights), eager(*as_float64(pooled, *wide_weights)))
    return g


def check_channel_scale(backend: str, x: Tensor, gate: Tensor) -> Tensor:
    y = squeeze_excite.CHANNEL_SCALE(backend, x, gate)
    expected = (x.to(gate.dtype) * gate[:, :, None, None]).to(x.dtype)
    assert_close_to_reference(y, expected, x.double() * gate.double()[:, :, None, None])
    assert y.stride() == empty_map(x, y.shape).stride()
    return y
