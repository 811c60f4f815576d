"""The CUDA kernels, compiled to PTX and executed on the CPU from their launch plans, against float64.

ptxrun fails a test on an access out of bounds or misaligned, a race on shared memory, or a divergent barrier.
"""

import itertools

import emulated_cuda
import phases
import pytest
import torch
from phases import feature_map, norm
from torch import Tensor

from effkernels import _native
from effkernels.ops._activation import Activation
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv.op import DWCONV, NO_NORM

if reason := emulated_cuda.why_not():
    pytest.skip(reason, allow_module_level=True)

ORDERS = ("fwd", "rev", "rand")
LAYOUTS = ("nchw", "channels_last")
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
SILU, HARDSWISH, RELU6 = Activation.SILU, Activation.HARDSWISH, Activation.RELU6


@pytest.fixture(scope="module", autouse=True)
def emulated():
    with emulated_cuda.installed():
        yield


def run(check, *args, order: str = "fwd", arch: str = "sm_80"):
    """A check of phases.py, in a given order of blocks, warps and lanes; it must leave its arguments alone."""
    emulated_cuda.options["order"], emulated_cuda.arch = order, arch
    before = [a.clone() if isinstance(a, Tensor) else None for a in args]
    got = check("cuda", *args)
    assert all(b is None or torch.equal(a, b) for a, b in zip(args, before, strict=True))
    return got


def convolve(x, k, stride, norm1=NO_NORM, norm2=NO_NORM, padding="auto", reduce=Reduce.NONE, **options):
    weight = torch.randn(x.shape[1], 1, k, k).to(x.dtype)
    return run(phases.check_dwconv, x, weight, norm1, norm2, stride, padding, reduce, **options)


INSTANCES = [
    *itertools.product((3, 5, 7), (1, 2), LAYOUTS, (f32,)),
    *itertools.product((3,), (1, 2), LAYOUTS, (f16, bf16)),
    (5, 2, "channels_last", f16),
    (5, 1, "nchw", bf16),
    (7, 2, "channels_last", bf16),
]


@pytest.mark.parametrize("k, stride, layout, dtype", INSTANCES)
def test_dwconv_instance(k, stride, layout, dtype):
    # Whole vectors and several tiles; then scalar accesses and tiles that hang over.
    for shape, reduce, act, order in (
        ((1, 24, 16, 40), Reduce.MEAN, HARDSWISH, "rev"),
        ((3, 17, 13, 15), Reduce.STATISTICS, SILU, "rand"),
    ):
        x = feature_map(shape, dtype, layout)
        convolve(x, k, stride, norm(shape[1], act), norm(shape[1], SILU), reduce=reduce, order=order)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 17, 129])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (13, 15)], ids="{0[0]}x{0[1]}".format)
def test_dwconv_odd_sizes(layout, channels, size):
    x = feature_map((3 if channels < 100 else 1, channels, *size), f32, layout)
    order = ORDERS[channels % 3]
    convolve(x, 3, 1, norm1=norm(channels, SILU), reduce=Reduce.MEAN, order=order)
    convolve(x, 3, 2, norm2=norm(channels, RELU6), reduce=Reduce.STATISTICS, order=order)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [0, 1, 4, "same"])
def test_dwconv_padding(layout, padding):
    # Padding is zero after the prologue, and may exceed half the kernel: whole windows then lie outside.
    x = feature_map((2, 8, 10, 9), f32, layout)
    for k, stride in ((3, 2), (5, 1)):
        convolve(x, k, stride, norm1=norm(8, Activation.SIGMOID), padding=padding, order="rand")


SLICES = {
    "misaligned channels": lambda x: x[:, 1:25],
    "every other channel": lambda x: x[:, ::2],
    "aligned channels": lambda x: x[:, 8:24],
    "rows and columns": lambda x: x[:, :24, 3:10, 1:17],
    "every other column": lambda x: x[:, :24, :, ::2],
    "every other image": lambda x: x[1::2],
    "transposed": lambda x: x[:, :24].transpose(2, 3),
    "batch as channels": lambda x: x[:, :24].transpose(0, 1),
    "expanded": lambda x: x[:1, :1].expand(2, 8, -1, -1),
    "misaligned storage": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [f32, f16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SLICES)
def test_slices(layout, name, dtype):
    x = SLICES[name](feature_map((4, 26, 12, 18), dtype, layout))
    n, c = x.shape[:2]
    convolve(x, 3, 1, norm2=norm(c, SILU), reduce=Reduce.MEAN, order="rand")
    run(phases.check_bn_apply, x, norm(c, SILU), Reduce.MEAN, order="rand")
    run(phases.check_channel_scale, x, torch.rand(n, c), order="rev")


@pytest.mark.parametrize("act", Activation)
def test_activations(act):
    x = 4 * feature_map((2, 8, 7, 9), f32, "channels_last")
    convolve(x, 3, 1, (None, None, None, None, 0.0, act), norm(8, act, affine=False))
    run(phases.check_bn_apply, 4 * feature_map((2, 3, 7, 9)), norm(3, act), Reduce.NONE)


def test_parameters_in_half_precision():
    for layout in LAYOUTS:
        x = feature_map((2, 16, 9, 9), f16, layout)
        mixed = [t.half() if i % 2 else t for i, t in enumerate(norm(16)[:4])]
        weight = torch.randn(16, 1, 3, 3).half()
        for mean, var, gamma, beta in (mixed, [t.half() for t in mixed]):
            wide = [t.float() for t in (mean, var, gamma, beta)]
            (y, _), (expected, _) = (
                DWCONV("cuda", x, weight, *v, 1e-3, SILU, *v, 1e-3, SILU, 1, 1, 1, 9, 9, Reduce.NONE)
                for v in ((mean, var, gamma, beta), wide)
            )
            assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_a_large_mean(layout):
    x = feature_map((3, 9, 40, 33), f32, layout) + 1000
    run(phases.check_bn_statistics, x, order="rand")
    run(phases.check_spatial_mean, x, order="rev")
    identity = torch.zeros(9, 1, 3, 3)
    identity[:, :, 1, 1] = 1
    _, stats = run(phases.check_dwconv, x, identity, NO_NORM, NO_NORM, 1, "auto", Reduce.STATISTICS, order="rand")
    torch.testing.assert_close(stats[1], x.double().var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_any_order(layout):
    x, weight = feature_map((2, 12, 33, 31), f16, layout), torch.randn(12, 1, 3, 3).half()
    vectors = norm(12, SILU)
    runs = [
        [
            *run(phases.check_dwconv, x, weight, vectors, vectors, 1, "auto", Reduce.STATISTICS, order=order),
            run(phases.check_bn_apply, x, vectors, Reduce.MEAN, order=order),
            run(phases.check_bn_statistics, x, order=order),
        ]
        for order in ORDERS
    ]
    assert all(all(map(torch.equal, runs[0], others)) for others in runs[1:])


@pytest.mark.parametrize("dtype", [f32, f16, bf16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_map_pass_sizes(layout, dtype):
    # One value; scalar and vector accesses; several parts per map; several groups of channels.
    shapes = [(3, 1, 1, 1), (1, 17, 7, 7), (3, 24, 14, 14), (1, 8, 60, 64), (1, 600, 3, 2), (2, 129, 1, 7)]
    for shape, order in zip(shapes, 2 * ORDERS, strict=True):
        x = feature_map(shape, dtype, layout)
        run(phases.check_bn_apply, x, norm(shape[1], SILU), Reduce.MEAN, order=order)
        run(phases.check_channel_scale, x, torch.rand(shape[:2]), order=order)
        run(phases.check_spatial_mean, x, order=order)
        run(phases.check_bn_statistics, x, order=order)


@pytest.mark.parametrize("dtype", [f32, f16, bf16])
@pytest.mark.parametrize("n, c, r", [(1, 1, 1), (3, 17, 5), (2, 96, 4), (130, 8, 2), (1, 576, 24)])
def test_se_gate(n, c, r, dtype):
    pooled = torch.randn(n, c)
    w1, b1, w2, b2 = (torch.randn(shape).to(dtype) for shape in ((r, c), (r,), (c, r), (c,)))
    for weights, order in (([w1, b1, w2, b2], "rand"), ([w1, None, w2, None], "rev")):
        run(phases.check_se_gate, pooled, weights, SILU, Activation.SIGMOID, order=order)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sm_90(layout):
    x, vectors = feature_map((2, 24, 14, 14), f16, layout), norm(24, SILU)
    convolve(x, 5, 1, vectors, vectors, reduce=Reduce.MEAN, arch="sm_90")
    run(phases.check_bn_apply, x, vectors, Reduce.MEAN, arch="sm_90")


def test_plans_stay_within_limits():
    none = ([0] * 4, 0.0, 0, 0)
    channels, sizes = (1, 3, 8, 96, 1152), ((1, 1), (1, 5000), (7, 7), (112, 112), (300, 3))
    for c, (h, w), k, stride, layout, dtype in itertools.product(
        channels, sizes, (3, 5, 7), (1, 2), LAYOUTS, ("float32", "float16")
    ):
        out = [(size - 1) // stride + 1 for size in (h, w)]
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        maps = (torch.empty(s, device="meta", memory_format=memory_format) for s in ((5, c, h, w), (5, c, *out)))
        x, y = ((0, list(m.shape), list(m.stride())) for m in maps)
        plan = _native.introspection.dwconv_plan(
            x=x, y=y, dtype=dtype, channels_last=layout == "channels_last", weight=0, prologue=none, epilogue=none,
            kernel_size=k, stride=stride, pad_top=k // 2, pad_left=k // 2, reduce=Reduce.STATISTICS,
        )  # fmt: skip
        for launch in plan["launches"]:
            assert 1 <= launch["block"] <= 256
            assert launch["shared_bytes"] <= 48 * 1024
            assert launch["grid"] >= 1
