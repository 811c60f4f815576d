"""The Triton kernels in Triton's interpreter: every phase op, and the public functions through them."""

import pytest
import torch
from hypothesis import given, settings
from strategies import drawn_cases

from effkernels import ops, use_backend
from effkernels.ops._cases import assert_close_to_reference, cases_for, feature_map
from effkernels.ops.batch_norm.cases import compare_sums
from effkernels.ops.batch_norm.op import BN_STATISTICS, Reduce
from effkernels.ops.dwconv.op import DWCONV, NO_NORM
from effkernels.ops.pointwise.cases import PointwiseBackward
from effkernels.ops.pointwise.op import POINTWISE, POINTWISE_BACKWARD

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked off


@pytest.mark.parametrize("case", cases_for("triton", "core"), ids=str)
def test_case(case):
    case.check("triton")


@settings(max_examples=15)
@given(drawn_cases("triton"))
def test_drawn_case(case):
    case.check("triton")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_means_near_zero_are_as_exact_as_eagers(layout):
    """Beside deviations of 1: what is far from a lane's first value, or a tile's largest, must not blur them."""
    x = feature_map((3, 16, 13, 10), f32, layout)
    weight = torch.eye(16).roll(1, 0)
    pointwise = POINTWISE("triton", x, weight, *NO_NORM, None, None, None, Reduce.STATISTICS)[1][0].roll(-1)
    for mean in (BN_STATISTICS("triton", x)[0], pointwise):
        assert_close_to_reference(mean, x.mean((0, 2, 3)), x.double().mean((0, 2, 3)))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_what_lies_beyond_a_map_does_not_overflow(layout):
    """Normalised, the zeros that are loaded there are infinite in float16: the mean is 10^5 deviations off."""
    arguments = PointwiseBackward(shape=(1, 16, 3, 3), outputs=16, layout=layout, dtype=f16).make()
    names = [argument.name for argument in POINTWISE_BACKWARD.overloads["triton"]._schema.arguments]
    given = dict(zip(names, arguments, strict=True))
    vector = torch.full((16,), -300.0)
    given |= dict(x=torch.full_like(given["x"], -300), mean1=vector, var1=torch.zeros(16), eps1=1e-5)
    given |= dict(gamma1=torch.ones(16), beta1=torch.zeros(16))
    assert all(output.isfinite().all() for output in POINTWISE_BACKWARD("triton", *given.values()))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_statistics_know_nothing_of_windows_beyond_the_map(layout):
    """Those on the map cancel to zero; some of the tile's others, half of zeros, are infinite in float16."""
    x = torch.full_like(feature_map((1, 16, 9, 8), f16, layout), 6e4)
    weight = torch.zeros(16, 1, 3, 3, dtype=f16)
    weight[..., 1, :2] = torch.tensor([10.0, -10.0])
    y, statistics = DWCONV("triton", x, weight, *NO_NORM, *NO_NORM, 1, 0, 0, 7, 6, Reduce.STATISTICS)
    assert not y.any() and not statistics.any()


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
    (comparison,) = compare_sums(pooled, y, Reduce.MEAN)
    assert_close_to_reference(*comparison[1:])


@pytest.mark.parametrize("training", [True, False])
def test_bn_act(training):
    tensors = [t.requires_grad_() for t in (feature_map((2, 5, 4, 5)), torch.rand(5) + 0.5, torch.randn(5))]
    check(lambda *t: ops.bn_act(*t, training=training), f32, *tensors, torch.randn(5), torch.rand(5) + 0.5)


@pytest.mark.parametrize("function", [ops.squeeze_excite, ops.squeeze_excite_gate])
def test_squeeze_excite(function):
    weights = torch.randn(3, 5, 1, 1), torch.randn(3), torch.randn(5, 3, 1, 1), torch.randn(5)
    tensors = [t.requires_grad_() for t in (feature_map((2, 5, 4, 5), f32, "channels_last"), *weights)]
    check(function, f32, *tensors)


FIRST = {case.op.name: case for case in reversed(cases_for("triton", "core"))}  # of each op


@pytest.mark.parametrize("name", FIRST)
def test_opcheck(name):
    torch.library.opcheck(FIRST[name].op.overloads["triton"], FIRST[name].arguments())


def test_compiles_into_one_graph():
    tensors = [torch.randn(5, 1, 3, 3), torch.rand(5) + 0.5, torch.randn(5), torch.randn(5), torch.rand(5) + 0.5]
    x = feature_map((2, 5, 6, 7))
    with use_backend("triton"):
        compiled = torch.compile(ops.dwconv_bn_swish, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, *tensors), ops.dwconv_bn_swish(x, *tensors))
