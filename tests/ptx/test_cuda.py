"""The CUDA kernels, compiled to PTX and executed on the CPU from their launch plans, against float64.

ptxrun fails a test on an access out of bounds or misaligned, a race on shared memory, or a divergent barrier.
"""

import itertools

import emulated_cuda as cuda
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close_to_reference
from torch import Tensor

from effkernels import _native
from effkernels.ops._activation import Activation, activate
from effkernels.ops._geometry import extra_padding, resolve_padding
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.squeeze_excite import reference as se_reference

if reason := cuda.why_not():
    pytest.skip(reason, allow_module_level=True)

ORDERS = ("fwd", "rev", "rand")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
HALVES = (torch.float16, torch.bfloat16)
NO_TRANSFORM = (None, None, None, None, 0.0, Activation.IDENTITY)


def random_map(*shape: int, layout: str = "nchw", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def random_norm(channels: int, act: int, dtype: torch.dtype = torch.float32, **changes: Tensor | None) -> tuple:
    """mean, var, gamma, beta, eps, act."""
    vectors = {name: torch.randn(channels) for name in ("mean", "var", "gamma", "beta")}
    vectors["var"] = vectors["var"].abs() + 0.5
    return *({name: t.to(dtype) for name, t in vectors.items()} | changes).values(), 1e-3, act


def double(arguments: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)


def transformed(x: Tensor, mean, var, gamma, beta, eps: float, act: int) -> Tensor:
    if mean is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        vectors = [None if t is None else t.to(wide) for t in (mean, var, gamma, beta)]
        x = F.batch_norm(x, *vectors, False, 0.0, eps)
    return activate(x, act)


def reduced(y: Tensor, reduce: int) -> Tensor:
    y = y.double()
    if reduce == Reduce.MEAN:
        return y.mean((2, 3))
    if reduce == Reduce.STATISTICS:
        return torch.stack([y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)])
    return y.new_empty(0)


def reference_dwconv(x: Tensor, weight: Tensor, prologue: tuple, epilogue: tuple, window: tuple) -> Tensor:
    stride, top, left, out_h, out_w = window
    k = weight.shape[2]
    bottom = extra_padding(x.shape[2], out_h, top, k, stride)
    right = extra_padding(x.shape[3], out_w, left, k, stride)
    x = F.pad(transformed(x, *prologue), (0, right, 0, bottom))
    d = F.conv2d(x, weight, None, stride, (top, left), 1, x.shape[1])
    return transformed(d[:, :, :out_h, :out_w], *epilogue)


def check_dwconv(
    x: Tensor, k: int, stride: int, *, prologue: tuple = NO_TRANSFORM, epilogue: tuple = NO_TRANSFORM,
    padding: int | str = "auto", reduce: int = Reduce.NONE, weight: Tensor | None = None, **options,
) -> tuple[Tensor, Tensor, list]:  # fmt: skip
    if weight is None:
        weight = torch.randn(x.shape[1], 1, k, k).to(x.dtype)
    (top, out_h), (left, out_w) = (resolve_padding("dwconv", padding, size, k, stride) for size in x.shape[2:])
    window = (stride, top, left, out_h, out_w)
    before = x.clone()
    y, sums, results = cuda.dwconv(x, weight, *prologue, *epilogue, *window, reduce, race=True, **options)
    eager = reference_dwconv(x, weight, prologue, epilogue, window)
    wide = reference_dwconv(x.double(), weight.double(), double(prologue), double(epilogue), window)
    assert_close_to_reference(y, eager, wide)
    assert_sums(sums, y, reduce)
    assert torch.equal(x, before)
    return y, sums, results


def assert_sums(sums: Tensor, y: Tensor, reduce: int) -> None:
    """Mean and variance are of y as stored; PyTorch's own, in float32, is the yardstick."""
    assert_close_to_reference(sums, reduced(y.float(), reduce).float(), reduced(y, reduce))


INSTANCES = [
    *itertools.product((3, 5, 7), (1, 2), LAYOUTS, (torch.float32,)),
    *itertools.product((3,), (1, 2), LAYOUTS, HALVES),
    (5, 2, "channels_last", torch.float16),
    (5, 1, "nchw", torch.bfloat16),
    (7, 2, "channels_last", torch.bfloat16),
]


@pytest.mark.parametrize("k, stride, layout, dtype", INSTANCES)
def test_dwconv_instance(k, stride, layout, dtype):
    # Whole vectors of channels, several tiles, every phase; then scalar accesses and a tile that hangs over.
    whole, ragged = (1, 24, 16, 40), (3, 17, 13, 15)
    cases = [
        (whole, Reduce.MEAN, Activation.HARDSWISH, "rev"),
        (ragged, Reduce.STATISTICS, Activation.SILU, "rand"),
    ]
    for shape, reduce, act, order in cases:
        x = random_map(*shape, layout=layout, dtype=dtype)
        prologue, epilogue = random_norm(shape[1], act), random_norm(shape[1], Activation.SILU, dtype)
        check_dwconv(x, k, stride, prologue=prologue, epilogue=epilogue, reduce=reduce, order=order)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 17, 129])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (13, 15)], ids="{0[0]}x{0[1]}".format)
def test_dwconv_odd_sizes(layout, channels, size):
    order = ORDERS[channels % 3]
    x = random_map(3 if channels < 100 else 1, channels, *size, layout=layout)
    check_dwconv(x, 3, 1, prologue=random_norm(channels, Activation.SILU), reduce=Reduce.MEAN, order=order)
    check_dwconv(x, 3, 2, epilogue=random_norm(channels, Activation.RELU6), reduce=Reduce.STATISTICS, order=order)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [0, 1, 4, "same"])
def test_dwconv_padding(layout, padding):
    # Padding is zero after the prologue, and may exceed half the kernel: whole windows then lie outside.
    x = random_map(2, 8, 10, 9, layout=layout)
    for k, stride in ((3, 2), (5, 1)):
        check_dwconv(x, k, stride, padding=padding, prologue=random_norm(8, Activation.SIGMOID), order="rand")


def slices(layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    x = random_map(4, 26, 12, 18, layout=layout, dtype=dtype)
    return {
        "misaligned channels": x[:, 1:25],
        "every other channel": x[:, ::2],
        "aligned channels": x[:, 8:24],
        "rows and columns": x[:, :24, 3:10, 1:17],
        "every other column": x[:, :24, :, ::2],
        "every other image": x[1::2],
        "transposed": x[:, :24].transpose(2, 3),
        "batch as channels": x[:, :24].transpose(0, 1),
        "expanded": x[:1, :1].expand(2, 8, -1, -1),
        "misaligned storage": torch.cat([x.flatten()[:1], x.flatten()])[1:].view(4, 26, 12, 18),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", slices("nchw", torch.float32))
def test_slices(layout, name, dtype):
    x = slices(layout, dtype)[name]
    check_dwconv(x, 3, 1, epilogue=random_norm(x.shape[1], Activation.SILU), reduce=Reduce.MEAN, order="rand")
    check_bn_apply(x, random_norm(x.shape[1], Activation.SILU), Reduce.MEAN, order="rand")
    check_channel_scale(x, order="rev")


def test_dwconv_strided_weight():
    x = random_map(1, 16, 8, 8)
    check_dwconv(x, 3, 1, weight=torch.randn(16, 1, 6, 3).transpose(2, 3)[:, :, :, ::2])


@pytest.mark.parametrize("act", Activation)
def test_activations(act):
    x = 4 * random_map(2, 8, 7, 9, layout="channels_last")
    without_norm = (None, None, None, None, 0.0, act)
    check_dwconv(x, 3, 1, prologue=without_norm, epilogue=random_norm(8, act, gamma=None, beta=None))
    check_bn_apply(4 * random_map(2, 3, 7, 9), random_norm(3, act, gamma=None), Reduce.NONE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_large_mean(layout):
    x = random_map(3, 9, 40, 33, layout=layout) + 1000
    for sums in (cuda.bn_statistics(x, race=True, order="rand")[0], cuda.spatial_mean(x, race=True)[0]):
        reduce = Reduce.STATISTICS if sums.shape == (2, 9) else Reduce.MEAN
        assert_sums(sums, x, reduce)
    identity = torch.zeros(9, 1, 3, 3)
    identity[:, :, 1, 1] = 1
    _, sums, _ = check_dwconv(x, 3, 1, weight=identity, reduce=Reduce.STATISTICS, order="rand")
    torch.testing.assert_close(sums[1].double(), reduced(x, Reduce.STATISTICS)[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_any_order(layout):
    x = random_map(2, 12, 33, 31, layout=layout, dtype=torch.float16)
    weight = torch.randn(12, 1, 3, 3).half()
    norm = random_norm(12, Activation.SILU)
    runs = [
        [
            *cuda.dwconv(x, weight, *norm, *norm, 1, 1, 1, 33, 31, Reduce.STATISTICS, order=order)[:2],
            *cuda.bn_apply(x, *norm, Reduce.MEAN, order=order)[:2],
            cuda.bn_statistics(x, order=order)[0],
        ]
        for order in ORDERS
    ]
    for others in runs[1:]:
        assert all(map(torch.equal, runs[0], others))


def check_bn_apply(x: Tensor, norm: tuple, reduce: int, **options) -> None:
    y, sums, _ = cuda.bn_apply(x, *norm, reduce, race=True, **options)
    assert_close_to_reference(y, transformed(x, *norm), transformed(x.double(), *double(norm)))
    assert_sums(sums, y, reduce)


def check_channel_scale(x: Tensor, **options) -> None:
    gate = torch.rand(x.shape[:2])
    y, _ = cuda.channel_scale(x, gate, race=True, **options)
    assert_close_to_reference(y, se_reference.scale(x, gate), se_reference.scale(x.double(), gate.double()))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointwise_sizes(layout, dtype):
    # One value; scalar and vector accesses; several parts per map; several groups of channels.
    shapes = [(3, 1, 1, 1), (1, 17, 7, 7), (3, 24, 14, 14), (1, 8, 60, 64), (1, 600, 3, 2), (2, 129, 1, 7)]
    for shape, order in zip(shapes, 2 * ORDERS, strict=True):
        x = random_map(*shape, layout=layout, dtype=dtype)
        check_bn_apply(x, random_norm(shape[1], Activation.SILU, dtype), Reduce.MEAN, order=order)
        check_channel_scale(x, order=order)
        assert_sums(cuda.spatial_mean(x, race=True, order=order)[0], x, Reduce.MEAN)
        assert_sums(cuda.bn_statistics(x, race=True, order=order)[0], x, Reduce.STATISTICS)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("n, c, r", [(1, 1, 1), (3, 17, 5), (2, 96, 4), (130, 8, 2), (1, 576, 24)])
def test_se_gate(n, c, r, dtype):
    pooled = torch.randn(n, c)
    w1, w2, b1, b2 = (torch.randn(shape).to(dtype) for shape in ((r, c), (c, r), (r,), (c,)))
    for weights, order in (((w1, b1, w2, b2), "rand"), ((w1, None, w2, None), "rev")):
        codes = (Activation.SILU, Activation.SIGMOID)
        gate, _ = cuda.se_gate(pooled, *weights, *codes, race=True, order=order)
        eager, wide = (
            se_reference.se_gate(p, p, *w, *codes) for p, w in ((pooled, weights), (pooled.double(), double(weights)))
        )
        assert_close_to_reference(gate, eager, wide)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sm_90(layout):
    x = random_map(2, 24, 14, 14, layout=layout, dtype=torch.float16)
    norm = random_norm(24, Activation.SILU)
    check_dwconv(x, 5, 1, prologue=norm, epilogue=norm, reduce=Reduce.MEAN, arch="sm_90")
    check_bn_apply(x, norm, Reduce.MEAN, arch="sm_90")


def test_plans_stay_within_limits():
    none = ([0] * 4, 0.0, 0, 0)
    channels, sizes = (1, 3, 8, 96, 1152), ((1, 1), (1, 5000), (7, 7), (112, 112), (300, 3))
    for c, (h, w), k, stride, layout, dtype in itertools.product(
        channels, sizes, (3, 5, 7), (1, 2), LAYOUTS, ("float32", "float16")
    ):
        pad = k // 2
        out = [(size + 2 * pad - k) // stride + 1 for size in (h, w)]
        maps = (torch.empty(s, device="meta", memory_format=LAYOUTS[layout]) for s in ((5, c, h, w), (5, c, *out)))
        x, y = ((0, list(m.shape), list(m.stride())) for m in maps)
        plan = _native.introspection.dwconv_plan(
            x=x, y=y, dtype=dtype, channels_last=layout == "channels_last", weight=0, weight_stride=[k * k, k, 1],
            prologue=none, epilogue=none, kernel_size=k, stride=stride, pad_top=pad, pad_left=pad, reduce=2,
        )  # fmt: skip
        for launch in plan["launches"]:
            assert 1 <= launch["block"] <= 256
            assert launch["shared_bytes"] <= 48 * 1024
            assert launch["grid"] >= 1


