"""The public ops on every backend of this machine: values, gradients, running statistics, tracing, and bad input."""

import pytest
import torch
import torch.nn.functional as F

from effkernels import _native, backends, ops, use_backend
from effkernels.ops._cases import assert_close_to_reference, feature_map
from effkernels.ops._geometry import resolve_padding
from effkernels.ops.batch_norm.op import BN_ACT, BN_APPLY, BN_STATISTICS
from effkernels.ops.dwconv.op import DWCONV, DWCONV_BN_ACT, NO_NORM
from effkernels.ops.squeeze_excite.op import CHANNEL_SCALE, SE_GATE, SPATIAL_MEAN, SQUEEZE_EXCITE

CPU_BACKENDS = [name for name in ("cpp", "eager") if _native.MISSING.get(name) is None]
needs_cpp = pytest.mark.skipif(_native.MISSING["cpp"] is not None, reason=f"cpp: {_native.MISSING['cpp']}")
f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


def convolution(channels=6, k=3, dtype=f32):
    """weight, bn_weight, bn_bias, running_mean, running_var"""
    wide = torch.promote_types(dtype, f32)
    weight = torch.randn(channels, 1, k, k).to(dtype)
    vectors = torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5
    return weight, *(t.to(wide) for t in vectors)


def gate_weights(channels=6, reduced=2, dtype=f32):
    shapes = (reduced, channels, 1, 1), (reduced,), (channels, reduced, 1, 1), (channels,)
    return [torch.randn(s, dtype=dtype) for s in shapes]


def dwconv_reference(x, weight, gamma, beta, mean, var, training, stride, padding, momentum=0.1):
    k = weight.shape[2]
    (top, out_h), (left, out_w) = (resolve_padding("", padding, n, k, stride) for n in x.shape[2:])
    need_h, need_w = (out_h - 1) * stride + k, (out_w - 1) * stride + k
    padded = F.pad(x, (left, max(need_w - x.shape[3] - left, 0), top, max(need_h - x.shape[2] - top, 0)))
    d = F.conv2d(padded[:, :, :need_h, :need_w], weight, None, stride, groups=x.shape[1])
    y = F.silu(F.batch_norm(d, mean, var, gamma, beta, training, momentum))
    return y, y.mean((2, 3), dtype=torch.promote_types(y.dtype, f32))


def run(function, tensors, dtype):
    """Outputs, gradients of all inputs that require them, and the inputs that do not (running statistics)."""

    def fresh(t):
        if t is None:
            return None
        t_dtype = torch.promote_types(t.dtype, dtype) if dtype else t.dtype
        return t.detach().to(t_dtype).clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad)

    cast = [fresh(t) for t in tensors]
    outputs = function(*cast)
    leaves = [t for t in cast if t is not None and t.requires_grad]
    loss = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, leaves) if leaves else ()
    return [*outputs, *grads, *(t for t in cast if t is not None and not t.requires_grad)]


def check(function, reference, tensors):
    results = run(function, tensors, None), run(reference, tensors, None), run(reference, tensors, f64)
    for got, eager, exact in zip(*results, strict=True):
        assert_close_to_reference(got.detach(), eager.detach(), exact.detach())
    return results[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced channels_last"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("k, stride, padding", [(3, 1, "auto"), (5, 2, "same"), (7, 2, "auto"), (3, 2, 0)])
def test_dwconv_bn_swish(backend, k, stride, padding, dtype, layout, training):
    x = feature_map((3, 6, 12, 15), dtype, layout).requires_grad_()
    weight, gamma, beta, mean, var = convolution(6, k, dtype)
    tensors = [x, weight.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_(), mean, var]

    def fused(*t):
        options = dict(training=training, stride=stride, padding=padding, return_pooled=True)
        return ops.dwconv_bn_swish(*t, **options)

    y, *_ = check(fused, lambda *t: dwconv_reference(*t, training, stride, padding), tensors)
    assert y.is_contiguous(memory_format=torch.channels_last) == layout.endswith("channels_last")
    with torch.no_grad():
        check(fused, lambda *t: dwconv_reference(*t, training, stride, padding), [t.detach() for t in tensors])


def test_dwconv_without_running_statistics_or_affine(backend):
    x, weight = feature_map((2, 6, 5, 5)).requires_grad_(), torch.randn(6, 1, 3, 3, requires_grad=True)

    def fused(x, weight):
        return (ops.dwconv_bn_swish(x, weight, None, None, None, None, training=True),)

    check(fused, lambda x, w: dwconv_reference(x, w, None, None, None, None, True, 1, "auto")[:1], [x, weight])


@pytest.mark.parametrize("training", [False, True])
def test_dwconv_with_everything_in_16_bits(backend, training):
    tensors = [feature_map((3, 6, 12, 15), bf16), *(t.to(bf16) for t in convolution())]
    for t in tensors[:4]:
        t.requires_grad_()

    def fused(*t):
        return ops.dwconv_bn_swish(*t, training=training, return_pooled=True)

    check(fused, lambda *t: dwconv_reference(*t, training, 1, "auto"), tensors)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "activation, reference", [("silu", F.silu), ("identity", lambda z: z), ("hardswish", F.hardswish)]
)
def test_bn_act(backend, activation, reference, training):
    x = feature_map((3, 6, 5, 7)).requires_grad_()
    _, gamma, beta, mean, var = convolution()
    tensors = [x, gamma.requires_grad_(), beta.requires_grad_(), mean, var]

    def fused(*t):
        return (ops.bn_act(*t, training=training, activation=activation),)

    def plain(x, gamma, beta, mean, var):
        return (reference(F.batch_norm(x, mean, var, gamma, beta, training)),)

    check(fused, plain, tensors)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
def test_squeeze_excite(backend, gate, layout, dtype, pooled):
    x = feature_map((3, 6, 5, 7), dtype, layout).requires_grad_()
    mean = x.detach().mean((2, 3), dtype=f32).requires_grad_() if pooled else None
    tensors = [x, *(w.requires_grad_() for w in gate_weights()), mean]

    def fused(x, w1, b1, w2, b2, mean):
        y = ops.squeeze_excite(x, w1, b1, w2, b2, gate=gate, pooled=mean)
        return y, ops.squeeze_excite_gate(x, w1, b1, w2, b2, gate=gate, pooled=mean)

    def plain(x, w1, b1, w2, b2, mean):
        mean = x.mean((2, 3), dtype=w1.dtype) if mean is None else mean
        hidden = F.silu(F.linear(mean, w1.flatten(1), b1))
        g = getattr(F, gate)(F.linear(hidden, w2.flatten(1), b2))
        return (x * g[:, :, None, None]).to(x.dtype), g

    check(fused, plain, tensors)


@needs_cpp
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", ["auto", "same"])
@pytest.mark.parametrize("stride", [1, 2])
def test_dwconv_gradcheck(stride, padding, training):
    x = torch.randn(2, 3, 4, 5, dtype=f64, requires_grad=True)
    weight, gamma, beta, mean, var = convolution(3, 3, f64)

    def function(x, weight, gamma, beta):
        buffers = mean.clone(), var.clone()
        options = dict(training=training, stride=stride, padding=padding, return_pooled=True)
        return ops.dwconv_bn_swish(x, weight, gamma, beta, *buffers, **options)

    with use_backend("cpp"):
        assert torch.autograd.gradcheck(function, (x, *(t.requires_grad_() for t in (weight, gamma, beta))))


@needs_cpp
@pytest.mark.parametrize("function", [ops.squeeze_excite, ops.squeeze_excite_gate])
def test_squeeze_excite_gradcheck(function):
    x = torch.randn(2, 6, 3, 4, dtype=f64, requires_grad=True)
    weights = [w.requires_grad_() for w in gate_weights(dtype=f64)]
    with use_backend("cpp"):
        assert torch.autograd.gradcheck(function, (x, *weights))
        pooled = torch.randn(2, 6, dtype=f64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, p, *w: function(x, *w, pooled=p), (x, pooled, *weights))


def phase_arguments():
    weight, gamma, beta, mean, var = convolution()
    w1, b1, w2, b2 = gate_weights()
    w1, w2 = w1.flatten(1), w2.flatten(1)
    x = feature_map((2, 6, 5, 7), f32, "channels_last")
    window, norm = (2, 1, 1, 3, 4), (mean, var, gamma, beta, 1e-5, 1)
    grad = [t.clone().requires_grad_() for t in (x, weight, gamma, beta)]
    return {
        "dwconv": (DWCONV, (x, weight, *norm, *NO_NORM, *window, 1)),
        "dwconv statistics": (DWCONV, (x, weight, *NO_NORM, *norm, *window, 2)),
        "dwconv_bn_act": (DWCONV_BN_ACT, (*grad, mean, var, True, "", 1e-5, *window, 1, True)),
        "dwconv_bn_act frozen": (DWCONV_BN_ACT, (*grad, mean, var, False, "", 1e-5, *window, 1, False)),
        "bn_statistics": (BN_STATISTICS, (x,)),
        "bn_apply": (BN_APPLY, (x, *norm, 1)),
        "bn_act": (BN_ACT, (grad[0], *grad[2:], mean, var, True, "", 1e-5, 1)),
        "spatial_mean": (SPATIAL_MEAN, (grad[0],)),
        "se_gate": (SE_GATE, (torch.randn(2, 6, requires_grad=True), w1, b1, w2, b2, 1, 5)),
        "channel_scale": (CHANNEL_SCALE, (x, torch.rand(2, 6))),
        "squeeze_excite": (SQUEEZE_EXCITE, (grad[0], None, w1.requires_grad_(), b1, w2, b2, 1, 5)),
        "squeeze_excite pooled": (SQUEEZE_EXCITE, (grad[0], torch.rand(2, 6), w1, b1, w2, b2, 1, 5)),
    }


@needs_cpp
@pytest.mark.parametrize("case", phase_arguments())
def test_opcheck(case):
    op, arguments = phase_arguments()[case]
    torch.library.opcheck(op.overloads["cpp"], arguments)


@needs_cpp
def test_phases_have_no_gradient_of_their_own():
    x = torch.randn(1, 6, 4, 4, requires_grad=True)
    y, _ = DWCONV("cpp", x, torch.randn(6, 1, 3, 3), *NO_NORM, *NO_NORM, 1, 1, 1, 4, 4, 0)
    with pytest.raises(RuntimeError, match="dwconv is a phase of a fused op and has no gradient"):
        y.sum().backward()


@needs_cpp
def test_double_backward_is_refused():
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    with use_backend("cpp"):
        y = ops.bn_act(x, None, None, None, None, training=True)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compile_with_dynamic_shapes(backend):
    weight, gamma, beta, mean, var = convolution()
    weights = gate_weights()
    leaves = [t.requires_grad_() for t in (weight, gamma, beta, *weights)]

    def block(x):
        buffers = mean.clone(), var.clone()
        y, pooled = ops.dwconv_bn_swish(x, weight, gamma, beta, *buffers, training=True, stride=2, return_pooled=True)
        return ops.squeeze_excite(y, *weights, pooled=pooled), *buffers

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 6, 9, 11), (3, 6, 12, 8)):
        x = torch.randn(shape)
        expected, got = block(x), compiled(x)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(outputs[0].sum(), leaves) for outputs in (expected, got)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_casts_as_conv2d_does(backend):
    weight, gamma, beta, mean, var = convolution()
    x = torch.randn(2, 6, 8, 8)
    with torch.autocast("cpu", dtype=bf16):
        y = ops.dwconv_bn_swish(x, weight, gamma, beta, mean, var)
    assert y.dtype == bf16
    expected = ops.dwconv_bn_swish(x.to(bf16), weight.to(bf16), gamma, beta, mean, var)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@needs_cpp
@pytest.mark.parametrize("training", [False, True])
def test_saved_for_backward(training):
    """The input, the raw convolution output, and vectors: eager keeps the normalised map too."""
    weight, gamma, beta, mean, var = convolution(8)
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with use_backend("cpp"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.dwconv_bn_swish(x, weight.requires_grad_(), gamma, beta, mean, var, training=training, return_pooled=True)
    maps = 2 * x.numel() * 4
    vectors = (weight.numel() + 4 * 8) * 4
    assert maps < sum(saved.values()) <= maps + vectors


def test_running_statistics_follow_the_momentum(backend):
    x = torch.randn(4, 6, 5, 5)
    weight, gamma, beta, mean, var = convolution()
    for momentum in (0.0, 0.3, 1.0):
        got, expected = (mean.clone(), var.clone()), (mean.clone(), var.clone())
        ops.dwconv_bn_swish(x, weight, gamma, beta, *got, training=True, momentum=momentum)
        dwconv_reference(x, weight, gamma, beta, *expected, True, 1, "auto", momentum)
        torch.testing.assert_close(got, expected)


def test_empty_batch(backend):
    weight, gamma, beta, mean, var = convolution()
    y, pooled = ops.dwconv_bn_swish(
        torch.empty(0, 6, 9, 9), weight, gamma, beta, mean, var, stride=2, return_pooled=True
    )
    assert y.shape == (0, 6, 5, 5) and pooled.shape == (0, 6)
    assert ops.squeeze_excite(y, *gate_weights(), pooled=pooled).shape == y.shape


@needs_cpp
@pytest.mark.parametrize("training", [False, True])
def test_backward_of_an_empty_batch(training):
    vectors = [t.requires_grad_() for t in convolution()[:3]], convolution()[3:]
    with use_backend("cpp"):
        x = torch.empty(0, 6, 9, 9, requires_grad=True)
        y, pooled = ops.dwconv_bn_swish(x, *vectors[0], *vectors[1], training=training, return_pooled=True)
        ops.squeeze_excite(y, *gate_weights(), pooled=pooled).sum().backward()
    assert x.grad.shape == x.shape and all((t.grad == 0).all() for t in vectors[0])


@needs_cpp
@pytest.mark.parametrize("needed", ["x", "weight", "bn_weight", "bn_bias"])
def test_only_the_gradients_asked_for(needed):
    names = ("x", "weight", "bn_weight", "bn_bias")
    tensors = dict(zip(names, [torch.randn(2, 6, 5, 5), *convolution()[:3]], strict=True))
    tensors[needed].requires_grad_()
    with use_backend("cpp"):
        y = ops.dwconv_bn_swish(*tensors.values(), None, None, training=True)
    y.square().sum().backward()
    (expected,) = torch.autograd.grad(
        dwconv_reference(*tensors.values(), None, None, True, 1, "auto")[0].square().sum(), tensors[needed]
    )
    torch.testing.assert_close(tensors[needed].grad, expected, rtol=1e-4, atol=1e-4)


@needs_cpp
def test_forward_mode_is_refused():
    x = torch.randn(2, 6, 4, 4)
    with use_backend("cpp"), pytest.raises(RuntimeError, match=r"bn_act\.cpp has no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.bn_act(x, None, None, None, None, training=True), (x,), (x,))


@needs_cpp
def test_vmap_of_inference():
    weight, *rest = convolution()
    x = torch.randn(3, 2, 6, 5, 5)
    with use_backend("cpp"):
        got = torch.vmap(lambda x: ops.dwconv_bn_swish(x, weight, *rest))(x)
        expected = torch.stack([ops.dwconv_bn_swish(one, weight, *rest) for one in x])
    torch.testing.assert_close(got, expected)


@needs_cpp
def test_the_dispatcher_ops_check_too():
    x, weight = torch.ones(1, 6, 4, 4), torch.ones(6, 1, 3, 3)
    window = (1, 1, 1, 4, 4, 0)
    with pytest.raises(ValueError, match="weight must be"):
        DWCONV("cpp", x, torch.ones(6, 1, 1, 1), *NO_NORM, *NO_NORM, *window)
    with pytest.raises(ValueError, match=r"must have shape \[C\]"):
        DWCONV("cpp", x, weight, *NO_NORM, torch.ones(5), torch.ones(6), None, None, 0.0, 0, *window)
    with pytest.raises(ValueError, match=r"gate must be \[N, C\]"):
        CHANNEL_SCALE("cpp", x, torch.ones(1, 5))
    with pytest.raises(ValueError, match=r"w1 must be \[R, C\]"):
        SE_GATE("cpp", torch.ones(1, 6), torch.ones(2, 5), None, torch.ones(6, 2), None, 1, 5)


def test_autocast_leaves_float64_alone(backend):
    x, vectors = torch.randn(2, 6, 8, 8, dtype=f64), [t.to(f64) for t in convolution()]
    with torch.autocast("cpu", dtype=bf16):
        assert ops.dwconv_bn_swish(x, *vectors).dtype == f64


GOOD = dict(zip(("weight", "bn_weight", "bn_bias", "running_mean", "running_var"), convolution(), strict=True))
BAD_CONVOLUTIONS = {
    "no tensor": (dict(x=[1.0]), TypeError, r"x must be a tensor \[N, C, H, W\], got list"),
    "rank": (dict(x=torch.ones(6, 8, 8)), ValueError, r"x must be 4-dimensional .*, got shape \[6, 8, 8\]"),
    "integers": (dict(x=torch.ones(2, 6, 8, 8).int()), TypeError, r"x must be float32, .*, got torch.int32"),
    "no channels": (dict(x=torch.ones(2, 0, 8, 8)), ValueError, r"at least one channel, .*, got shape \[2, 0, 8, 8\]"),
    "channels": (
        dict(x=torch.ones(2, 5, 8, 8)),
        ValueError,
        r"weight must have shape \[5, 1, 3, 3\], got \[6, 1, 3, 3\]",
    ),
    "dense weight": (dict(weight=torch.ones(6, 6, 3, 3)), ValueError, r"weight must have shape \[6, 1, 3, 3\]"),
    "kernel size": (dict(weight=torch.ones(6, 1, 4, 4)), ValueError, r"k in \(3, 5, 7\), got \[6, 1, 4, 4\]"),
    "not square": (dict(weight=torch.ones(6, 1, 3, 5)), ValueError, r"k in \(3, 5, 7\), got \[6, 1, 3, 5\]"),
    "weight dtype": (
        dict(weight=torch.ones(6, 1, 3, 3).half()),
        TypeError,
        "weight must have the dtype of x, torch.float32",
    ),
    "fractional stride": (dict(stride=1.0), ValueError, r"stride must be one of \(1, 2\), got 1.0"),
    "stride": (dict(stride=3), ValueError, r"stride must be one of \(1, 2\), got 3"),
    "padding name": (dict(padding="valid"), TypeError, 'padding must be an int, "auto" or "same", got \'valid\''),
    "negative padding": (dict(padding=-1), ValueError, "padding must not be negative, got -1"),
    "map too small": (
        dict(x=torch.ones(1, 6, 2, 2), padding=0),
        ValueError,
        "kernel size 3 exceeds the padded input size 2",
    ),
    "activation": (dict(activation="gelu"), ValueError, "activation must be one of identity, silu, .*, got 'gelu'"),
    "vector length": (dict(bn_bias=torch.ones(5)), ValueError, r"bn_bias must have shape \[6\], got \[5\]"),
    "vector dtype": (
        dict(bn_weight=torch.ones(6).double()),
        TypeError,
        "bn_weight must be torch.float32 as x is, got torch.float64",
    ),
    "half of the statistics": (dict(running_var=None), ValueError, "running_mean and running_var must both be"),
    "no statistics": (
        dict(running_mean=None, running_var=None),
        ValueError,
        "must be tensors when training=False, got None",
    ),
    "one value": (
        dict(x=torch.ones(1, 6, 1, 1), training=True),
        ValueError,
        r"more than 1 value per channel when training, got input size \[1, 6, 1, 1\]",
    ),
    "another device": (
        dict(weight=torch.ones(6, 1, 3, 3, device="meta")),
        ValueError,
        "weight must be on cpu as x is, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS)
def test_bad_convolution(backend, case):
    change, error, message = BAD_CONVOLUTIONS[case]
    with pytest.raises(error, match="dwconv_bn_swish: .*" + message):
        ops.dwconv_bn_swish(**{"x": torch.ones(2, 6, 8, 8), **GOOD, **change})


GATE = dict(zip(("reduce_weight", "reduce_bias", "expand_weight", "expand_bias"), gate_weights(), strict=True))
BAD_GATES = {
    "rank": (dict(x=torch.ones(6, 8)), ValueError, "x must be 4-dimensional"),
    "matrix": (
        dict(reduce_weight=torch.ones(2, 6, 3, 3)),
        ValueError,
        r"reduce_weight must be \[R, C\] or \[R, C, 1, 1\], got",
    ),
    "no matrix": (dict(expand_weight=None), TypeError, r"expand_weight must be a tensor \[C, R\] or"),
    "channels": (dict(x=torch.ones(2, 5, 8, 8)), ValueError, r"reduce_weight must have shape \[2, 5\], got \[2, 6\]"),
    "reduced": (
        dict(expand_weight=torch.ones(6, 3)),
        ValueError,
        r"expand_weight must have shape \[6, 2\], got \[6, 3\]",
    ),
    "bias": (dict(reduce_bias=torch.ones(6)), ValueError, r"reduce_bias must have shape \[2\], got \[6\]"),
    "mixed weights": (
        dict(expand_weight=torch.ones(6, 2).half()),
        TypeError,
        "expand_weight must have the dtype of reduce_weight",
    ),
    "weight dtype": (
        dict(reduce_weight=torch.ones(2, 6).half()),
        TypeError,
        "reduce_weight must be torch.float32 as x is",
    ),
    "pooled shape": (dict(pooled=torch.ones(2, 5)), ValueError, r"pooled must have shape \[2, 6\], got \[2, 5\]"),
    "pooled dtype": (
        dict(pooled=torch.ones(2, 6).half()),
        TypeError,
        "pooled must be torch.float32, got torch.float16",
    ),
    "activation": (dict(activation="sigmoid"), ValueError, "activation must be one of identity, silu"),
    "gate": (dict(gate="softmax"), ValueError, "gate must be one of sigmoid, hardsigmoid, got 'softmax'"),
}


@pytest.mark.parametrize("function", [ops.squeeze_excite, ops.squeeze_excite_gate])
@pytest.mark.parametrize("case", BAD_GATES)
def test_bad_squeeze_excite(backend, case, function):
    change, error, message = BAD_GATES[case]
    with pytest.raises(error, match=f"{function.__name__}: .*" + message):
        function(**{"x": torch.ones(2, 6, 8, 8), **GATE, **change})


def test_shapes_on_the_meta_device():
    x, weight = torch.empty(2, 5, 6, 7, device="meta"), torch.empty(5, 1, 3, 3, device="meta")
    statistics = torch.empty(5, device="meta")
    with use_backend("eager"):
        y = ops.dwconv_bn_swish(x, weight, None, None, statistics, statistics, stride=2)
    assert (y.shape, y.device.type) == ((2, 5, 3, 4), "meta")


def test_unknown_backend():
    with pytest.raises(ValueError, match="name must be one of auto, cpp, cuda, triton, eager, got 'tpu'"):
        use_backend("tpu")


def test_a_backend_that_cannot_run_says_why():
    weight, *rest = convolution()
    with use_backend("cuda"), pytest.raises(RuntimeError, match="dwconv_bn_swish: backend 'cuda' cannot run: "):
        ops.dwconv_bn_swish(torch.ones(2, 6, 8, 8), weight, *rest)


@needs_cpp
def test_auto_prefers_the_kernels():
    with use_backend("auto"), backends.record_decisions() as decisions:
        ops.squeeze_excite(torch.ones(2, 6, 8, 8), *gate_weights())
    assert [d.backend for d in decisions] == ["cpp"]


def test_use_backend_nests_and_ends():
    before = backends._requested
    with use_backend("eager"):
        with use_backend("auto"):
            assert backends._requested == "auto"
        assert backends._requested == "eager"
    assert backends._requested == before
