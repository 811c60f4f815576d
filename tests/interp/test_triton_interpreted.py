"""The Triton kernels in Triton's interpreter: every phase op, and the public functions through them."""

import phases
import pytest
import torch
import torch.nn.functional as F
from phases import feature_map, norm
from tolerance import assert_close_to_reference

from effkernels import ops, use_backend
from effkernels.ops._activation import Activation
from effkernels.ops.batch_norm.op import BN_APPLY, BN_STATISTICS, Reduce
from effkernels.ops.dwconv.op import DWCONV, NO_NORM
from effkernels.ops.squeeze_excite.op import CHANNEL_SCALE, SE_GATE, SPATIAL_MEAN

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SILU, RELU6, HARDSWISH = Activation.SILU, Activation.RELU6, Activation.HARDSWISH

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked off

# dtype, layout, [N, C, H, W], k, stride, padding, reduce
CONVOLUTIONS = {
    "one pixel": (f32, "nchw", (3, 2, 1, 1), 3, 1, "auto", Reduce.MEAN),
    "one pixel, channels in lanes": (f16, "nchw", (1, 129, 1, 1), 5, 1, "same", Reduce.STATISTICS),
    "one row": (bf16, "channels_last", (1, 3, 1, 7), 3, 2, "same", Reduce.MEAN),
    "one column": (f32, "nchw", (2, 3, 7, 1), 5, 2, "auto", Reduce.STATISTICS),
    "one channel": (f16, "channels_last", (1, 1, 13, 15), 3, 1, 1, Reduce.STATISTICS),
    "two blocks of channels": (f16, "channels_last", (1, 129, 5, 6), 3, 1, "auto", Reduce.MEAN),
    "blocks of one-warp channels": (bf16, "nchw", (1, 17, 5, 6), 3, 1, "auto", Reduce.STATISTICS),
    "several bands": (f32, "channels_last", (1, 17, 13, 15), 3, 1, "auto", Reduce.STATISTICS),
    "several bands, stride 2": (f16, "nchw", (1, 3, 13, 15), 3, 2, "same", Reduce.MEAN),
    "several blocks of columns": (f32, "channels_last", (1, 2, 3, 37), 5, 1, "auto", Reduce.MEAN),
    "columns beyond a warp": (f32, "nchw", (1, 2, 3, 140), 3, 1, "auto", Reduce.STATISTICS),
    "no padding": (f32, "channels_last", (1, 17, 9, 8), 5, 1, 0, Reduce.NONE),
    "padding beyond the window": (f16, "nchw", (1, 3, 4, 5), 3, 2, 4, Reduce.MEAN),
    "uneven padding": (bf16, "channels_last", (2, 3, 13, 14), 5, 2, "same", Reduce.NONE),
    "k 7": (f32, "nchw", (1, 3, 13, 15), 7, 1, "auto", Reduce.MEAN),
    "k 7, stride 2": (f16, "channels_last", (1, 17, 13, 15), 7, 2, "same", Reduce.STATISTICS),
    "slice": (f32, "sliced nchw", (2, 3, 6, 7), 3, 1, "auto", Reduce.MEAN),
    "slice, channels in lanes": (f16, "sliced channels_last", (2, 17, 6, 7), 5, 2, "same", Reduce.STATISTICS),
    "empty batch": (f32, "channels_last", (0, 3, 6, 7), 3, 1, "auto", Reduce.MEAN),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_dwconv(case):
    dtype, layout, shape, k, stride, padding, reduce = CONVOLUTIONS[case]
    weight = torch.randn(shape[1], 1, k, k).to(dtype)
    phases.check_dwconv("triton", feature_map(shape, dtype, layout), weight, NO_NORM, NO_NORM, stride, padding, reduce)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [f32, f16])
def test_dwconv_between_norms(dtype, stride):
    # Padding is zero after the prologue, whose value at zero is not.
    x, weight = feature_map((2, 17, 6, 7), dtype, "channels_last"), torch.randn(17, 1, 3, 3).to(dtype)
    norms = norm(17, SILU, dtype), norm(17, HARDSWISH, dtype)
    phases.check_dwconv("triton", x, weight, *norms, stride, "auto", Reduce.STATISTICS)


def test_dwconv_activation_without_norm():
    prologue, epilogue = (*NO_NORM[:5], RELU6), (*NO_NORM[:5], SILU)
    x, weight = feature_map((1, 3, 6, 7)), torch.randn(3, 1, 5, 5)
    phases.check_dwconv("triton", x, weight, prologue, epilogue, 1, "auto", Reduce.NONE)


def test_dwconv_takes_a_strided_weight():
    weight = torch.randn(3, 3, 3, 1).permute(0, 3, 2, 1)
    phases.check_dwconv("triton", feature_map((1, 3, 6, 7)), weight, NO_NORM, NO_NORM, 1, "auto", Reduce.NONE)


def test_dwconv_passes_nan_and_inf():
    x = feature_map((1, 3, 6, 7))
    x[0, 0, 2, 3], x[0, 1, 4, 5], x[0, 2, 0, 0] = float("nan"), float("inf"), -float("inf")
    epilogue = norm(3, Activation.RELU)
    y, _ = phases.check_dwconv("triton", x, torch.randn(3, 1, 3, 3), NO_NORM, epilogue, 1, "auto", Reduce.NONE)
    assert y[0, 0].isnan().sum() == 9


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_statistics_of_a_mean_far_from_zero(layout):
    x = feature_map((3, 5, 13, 15), f32, layout).add_(1000)
    centre = F.pad(torch.ones(5, 1, 1, 1), (1, 1, 1, 1))
    stats = phases.check_bn_statistics("triton", x)
    y, sums = DWCONV("triton", x, centre, *NO_NORM, *NO_NORM, 1, 1, 1, 13, 15, Reduce.STATISTICS)
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    phases.check_statistics(sums, x)
    torch.testing.assert_close(sums[1], stats[1])


MAPS = {
    "one pixel": (f32, "nchw", (3, 129, 1, 1)),
    "one row": (f16, "nchw", (1, 2, 1, 7)),
    "one column": (bf16, "channels_last", (1, 3, 7, 1)),
    "one channel": (f32, "channels_last", (2, 1, 13, 15)),
    "several spans": (f16, "channels_last", (2, 129, 5, 6)),
    "blocks of channels": (bf16, "nchw", (2, 17, 13, 15)),
    "slice": (f32, "sliced nchw", (2, 3, 5, 7)),
    "slice, channels in lanes": (f16, "sliced channels_last", (2, 17, 3, 7)),
    "empty batch": (f32, "nchw", (0, 3, 6, 7)),
}


@pytest.mark.parametrize("case", MAPS)
def test_passes_over_a_map(case):
    dtype, layout, shape = MAPS[case]
    x = feature_map(shape, dtype, layout)
    phases.check_bn_statistics("triton", x)
    phases.check_bn_apply("triton", x, norm(shape[1], SILU, dtype), Reduce.MEAN)
    phases.check_spatial_mean("triton", x)
    phases.check_channel_scale("triton", x, torch.rand(shape[:2]))


@pytest.mark.parametrize("act", list(Activation))
def test_activations(act):
    x = torch.tensor([-float("inf"), -1e4, -90, -3.5, -3, -1, 0, 1, 3, 3.5, 6, 7, 90, float("inf"), float("nan")])
    x = x.repeat(2, 1).view(2, 1, 1, -1)
    phases.check_bn_apply("triton", x, (torch.zeros(1), torch.ones(1), None, None, 0.0, act), Reduce.NONE)


def test_bn_apply_reads_strided_vectors():
    mean, var, gamma, beta = torch.rand(17, 4).add_(0.5).unbind(1)
    phases.check_bn_apply("triton", feature_map((1, 17, 3, 4)), (mean, var, gamma, beta, 1e-5, SILU), Reduce.NONE)


@pytest.mark.parametrize("dtype", [f32, f16])
@pytest.mark.parametrize("batch, channels, reduced", [(0, 3, 1), (1, 1, 1), (3, 17, 5), (2, 300, 129)])
def test_se_gate(batch, channels, reduced, dtype):
    w1, w2 = torch.randn(reduced, channels) / channels**0.5, torch.randn(channels, reduced) / reduced**0.5
    weights = [w1.to(dtype), torch.randn(reduced).to(dtype), w2.to(dtype), None]
    phases.check_se_gate("triton", torch.randn(batch, channels), weights, SILU, Activation.SIGMOID)


def test_se_gate_takes_any_strides():
    pooled, w1, w2 = torch.randn(17, 3).T, torch.randn(17, 5).T, torch.randn(5, 17).T
    weights = [w1, None, w2, torch.randn(17, 2)[:, 0]]
    phases.check_se_gate("triton", pooled, weights, Activation.RELU, Activation.HARDSIGMOID)


def run(function, backend, dtype, *tensors):
    """Outputs of `function`, gradients of their sum times fixed weights, and the tensors that it may have updated."""
    vectors = torch.promote_types(dtype, torch.float32)
    tensors = [
        t.detach().to(vectors if t.dim() == 1 else dtype, copy=True).requires_grad_(t.requires_grad) for t in tensors
    ]
    with use_backend(backend):
        outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in tensors if t.requires_grad]
    loss = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves), *(t for t in tensors if not t.requires_grad)]


def check(function, dtype, *tensors):
    got = run(function, "triton", dtype, *tensors)
    eager = run(function, "eager", dtype, *tensors)
    rounded = (t if t.dim() == 1 else t.detach().to(dtype).requires_grad_() for t in tensors)
    exact = run(function, "eager", f64, *rounded)
    for triple in zip(got, eager, exact, strict=True):
        assert_close_to_reference(*triple)


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("training", [True, False])
def test_dwconv_bn_swish(training, dtype):
    parameters = [feature_map((2, 5, 6, 7)), torch.randn(5, 1, 3, 3), torch.rand(5) + 0.5, torch.randn(5)]
    running = [torch.randn(5), torch.rand(5) + 0.5]  # updated in place when training, and compared

    def function(x, *tensors):
        return ops.dwconv_bn_swish(x, *tensors, training=training, stride=2, padding="same", return_pooled=True)

    check(function, dtype, *(p.requires_grad_() for p in parameters), *running)


def test_dwconv_bn_swish_without_gradients():
    tensors = [torch.randn(5, 1, 3, 3), torch.rand(5) + 0.5, torch.randn(5), torch.randn(5), torch.rand(5) + 0.5]
    x = feature_map((2, 5, 6, 7), f16, "channels_last")
    with use_backend("triton"):
        y, pooled = ops.dwconv_bn_swish(x, *(t.half() for t in tensors), return_pooled=True)
    with use_backend("eager"):
        expected = ops.dwconv_bn_swish(x, *(t.half() for t in tensors))
        exact = ops.dwconv_bn_swish(x.double(), *(t.half().double() for t in tensors))
    assert_close_to_reference(y, expected, exact)
    phases.check_sums(pooled, y, Reduce.MEAN)


@pytest.mark.parametrize("training", [True, False])
def test_bn_act(training):
    tensors = [t.requires_grad_() for t in (feature_map((2, 5, 4, 5)), torch.rand(5) + 0.5, torch.randn(5))]
    check(lambda *t: ops.bn_act(*t, training=training), f32, *tensors, torch.randn(5), torch.rand(5) + 0.5)


@pytest.mark.parametrize("function", [ops.squeeze_excite, ops.squeeze_excite_gate])
def test_squeeze_excite(function):
    weights = torch.randn(3, 5, 1, 1), torch.randn(3), torch.randn(5, 3, 1, 1), torch.randn(5)
    tensors = [t.requires_grad_() for t in (feature_map((2, 5, 4, 5), f32, "channels_last"), *weights)]
    check(function, f32, *tensors)


X, NORM = torch.randn(2, 3, 4, 5), norm(3, SILU)
PHASES = {
    "dwconv": (DWCONV, (X, torch.randn(3, 1, 3, 3), *NORM, *NORM, 1, 1, 1, 4, 5, Reduce.STATISTICS)),
    "bn_statistics": (BN_STATISTICS, (X,)),
    "bn_apply": (BN_APPLY, (X, *NORM, Reduce.MEAN)),
    "spatial_mean": (SPATIAL_MEAN, (X,)),
    "se_gate": (SE_GATE, (torch.randn(2, 3), torch.randn(2, 3), None, torch.randn(3, 2), None, SILU, 5)),
    "channel_scale": (CHANNEL_SCALE, (X, torch.rand(2, 3))),
}


@pytest.mark.parametrize("name", PHASES)
def test_opcheck(name):
    op, args = PHASES[name]
    torch.library.opcheck(op.overloads["triton"], args)


def test_compiles_into_one_graph():
    tensors = [torch.randn(5, 1, 3, 3), torch.rand(5) + 0.5, torch.randn(5), torch.randn(5), torch.rand(5) + 0.5]
    x = feature_map((2, 5, 6, 7))
    with use_backend("triton"):
        compiled = torch.compile(ops.dwconv_bn_swish, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, *tensors), ops.dwconv_bn_swish(x, *tensors))
