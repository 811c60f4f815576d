"""The MBConv training op on every backend that has it: gradients, what it saves, what it leaves out, tracing."""

import itertools
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effkernels
from effkernels import MBConv, _native, backends, ops, use_backend
from effkernels.ops._cases import assert_close_to_reference
from effkernels.ops._op import COMPOSITIONS, OPS
from effkernels.ops.bn_project import Stage
from effkernels.ops.expand_dwconv.op import EXPAND_DWCONV_GRADIENTS
from effkernels.ops.mbconv import Gate
from effkernels.ops.mbconv.op import MBCONV, Expanded
from effkernels.profiling import as_on_gpu, count_bytes, on_meta
from effkernels.profiling.saved import saved_bytes

f32, f64 = torch.float32, torch.float64
BACKENDS = [
    name
    for name in MBCONV.overloads
    if "cpu" in backends.DEVICES[name] and backends.why_not(name, torch.empty(1)) is None
]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they save on maps this small, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def kernels(request):
    with use_backend(request.param):
        yield request.param


WAYS = {
    "kept": (Expanded.KEPT, torch.contiguous_format),
    "kept, channels_last": (Expanded.KEPT, torch.channels_last),
    "computed again": (Expanded.COMPUTED_AGAIN, torch.channels_last),
    "on chip": (Expanded.ON_CHIP, torch.channels_last),
}


@pytest.fixture(params=WAYS)
def way(request, kernels, monkeypatch):
    """What makes a block have its expanded map kept, computed again or on chip, however many channels it has."""
    expanded, layout = WAYS[request.param]
    if expanded == Expanded.ON_CHIP and kernels not in EXPAND_DWCONV_GRADIENTS.overloads:
        pytest.skip(f"{kernels} has no kernels that expand on chip")
    memory = "default" if expanded == Expanded.KEPT else "minimal"
    most = 10**6 if expanded == Expanded.ON_CHIP else 0
    monkeypatch.setattr(sys.modules["effkernels.ops.mbconv"], "CHANNELS_ON_CHIP", most)
    return dict(layout=layout, memory=memory)


def stage(weight: Tensor, *, bias=False, fixed=False, activation="silu") -> Stage:
    channels, dtype = weight.shape[0], weight.dtype
    vectors = [torch.rand(channels, dtype=dtype) + 0.5, torch.randn(channels, dtype=dtype)]
    running = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.5
    bias = torch.randn(channels, dtype=dtype) if bias else None
    return Stage(weight, bias, *vectors, *running, not fixed, 0.1, 1e-3, activation)


def block(
    shape=(2, 3, 5, 4), hidden=5, out=3, k=3, stride=1, expand=True, se=True, fixed=(), bias=False, scale=False,
    dtype=f64, layout=torch.contiguous_format, memory="default",
):  # fmt: skip
    """The arguments of `mbconv`, positional and by name; every tensor but buffers and scale requires a gradient."""
    hidden = hidden if expand else shape[1]
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)

    def weight(*sizes):
        return torch.randn(*sizes, dtype=dtype) / (sizes[1] * sizes[2] ** 2) ** 0.5

    gate = None
    if se:
        gate = Gate(
            weight(2, hidden, 1, 1), torch.randn(2, dtype=dtype), weight(hidden, 2, 1, 1),
            torch.randn(hidden, dtype=dtype), "silu", "sigmoid",
        )  # fmt: skip
    stages = (
        stage(weight(hidden, shape[1], 1, 1), bias=bias, fixed="expand" in fixed) if expand else None,
        stage(weight(hidden, 1, k, k), fixed="depthwise" in fixed),
        gate,
        stage(weight(out, hidden, 1, 1), bias=bias, fixed="project" in fixed, activation="identity"),
    )
    for t in leaves(x, stages):
        t.requires_grad_()
    factors = torch.tensor([0.0, 1.25], dtype=dtype).repeat(shape[0])[: shape[0]] if scale else None
    residual = stride == 1 and out == shape[1]
    return (x, *stages), dict(stride=stride, scale=factors, residual=residual, memory=memory)


def leaves(x, stages):
    expand, depthwise, gate, project = stages
    found = [x, *(() if gate is None else gate[:4])]
    for s in (expand, depthwise, project):
        found += () if s is None else s[:4]
    return [t for t in found if t is not None]


def replaced(positional, values):
    """The arguments with `values` in the place of the leaves."""
    table = {id(old): new for old, new in zip(leaves(positional[0], positional[1:]), values, strict=True)}

    def swap(t):
        return table.get(id(t), t)

    x, *stages = positional
    return swap(x), *(None if s is None else type(s)(*map(swap, s)) for s in stages)


def gradients(positional, named, needed=None):
    y = ops.mbconv(*positional, **named)
    wanted = leaves(positional[0], positional[1:]) if needed is None else needed
    return y, torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum(), wanted)


VARIANTS = {
    "whole": dict(scale=True),
    "strided": dict(stride=2, out=4),
    "5x5": dict(k=5),
    "no expand": dict(expand=False),
    "no gate": dict(se=False),
    "biases": dict(bias=True),
    "fixed, with biases": dict(bias=True, fixed=("expand", "project")),
    **{
        "fixed " + "-".join(fixed): dict(fixed=fixed, scale=True)
        for count in (1, 2, 3)
        for fixed in itertools.combinations(("expand", "depthwise", "project"), count)
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, way, kernels):
    positional, named = block(**way, **VARIANTS[variant])

    def function(*values):
        return ops.mbconv(*replaced(positional, values), **named)

    assert torch.autograd.gradcheck(function, leaves(positional[0], positional[1:]), fast_mode=variant != "whole")


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_eager(variant, way, kernels):
    positional, named = block(**way, **VARIANTS[variant])
    stages = [s for s in (positional[1], positional[2], positional[4]) if s is not None]
    buffers = [t for s in stages for t in s[4:6]]
    start = [t.clone() for t in buffers]
    got = gradients(positional, named), [t.clone() for t in buffers]
    for buffer, before in zip(buffers, start, strict=True):
        buffer.copy_(before)
    with use_backend("eager"):
        expected = gradients(positional, named), buffers
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["far from zero", "nearly of rank 3"])
def test_gradients_of_ill_conditioned_inputs(kind, way, kernels):
    """Those of x and of the expand weight are as accurate as eager's, though moments of x cancel."""
    (x, *stages), named = block(shape=(4, 12, 9, 8), hidden=40, out=12, dtype=f32, **way)
    if kind == "far from zero":
        x.data += 30
    else:
        x.data = torch.einsum("oc,nchw->nohw", torch.randn(12, 3), x[:, :3]) + 1e-3 * x
        x.data = x.data.contiguous(memory_format=way["layout"])
    unknown = dict(running_mean=None, running_var=None)
    positional = (x, *(s._replace(**unknown) if isinstance(s, Stage) else s for s in stages))

    def found(backend, dtype):
        given = [v.detach().to(dtype).requires_grad_() for v in leaves(positional[0], positional[1:])]
        arguments = replaced(positional, given)
        with use_backend(backend):
            return gradients(arguments, named, [arguments[0], arguments[1].weight])[1]

    for got, eager, exact in zip(found(kernels, f32), found("eager", f32), found("eager", f64), strict=True):
        assert_close_to_reference(got, eager, exact)


def test_only_the_gradients_asked_for(kernels):
    positional, named = block(scale=True, bias=True)
    _, expected = gradients(positional, named)
    found = leaves(positional[0], positional[1:])
    for i, leaf in enumerate(found):
        for other in found:
            other.requires_grad_(other is leaf)
        _, (grad,) = gradients(positional, named, [leaf])
        torch.testing.assert_close(grad, expected[i])
    for leaf in found:
        leaf.requires_grad_(False)
    assert ops.mbconv(*positional, **named).grad_fn is None


def test_same_bits_every_time(kernels):
    positional, named = block((4, 24, 19, 17), hidden=70, out=24, k=5, dtype=f32, layout=torch.channels_last)
    runs = [gradients(positional, named) for _ in range(2)]
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(a, b)


def test_frozen_branch_passes_the_gradient_on(kernels):
    positional, named = block(fixed=("expand", "depthwise", "project"))
    x = positional[0]
    for leaf in leaves(x, positional[1:]):
        leaf.requires_grad_(leaf is x)
    _, (grad,) = gradients(positional, named, [x])
    with use_backend("eager"):
        _, (expected,) = gradients(positional, named, [x])
    torch.testing.assert_close(grad, expected)


def test_double_use(kernels):
    positional, named = block()
    found = leaves(positional[0], positional[1:])

    def twice():
        y = ops.mbconv(ops.mbconv(*positional, **named), *positional[1:], **named)
        return torch.autograd.grad(y.square().sum(), found)

    got = twice()
    with use_backend("eager"):
        torch.testing.assert_close(got, twice())


@pytest.mark.parametrize("variant", ["whole", "fixed, with biases", "no expand", "no gate"])
def test_the_expanded_map_computed_again_gives_the_same_bits(variant, kernels):
    positional, named = block((2, 8, 9, 7), hidden=24, out=8, dtype=f32, **VARIANTS[variant])
    memories = dict(memory="default"), dict(memory="minimal")
    (y, grads), (minimal_y, minimal_grads) = (gradients(positional, named | memory) for memory in memories)
    assert torch.equal(minimal_y, y)
    assert all(map(torch.equal, minimal_grads, grads))


@pytest.mark.parametrize("expand", [True, False])
def test_saved_for_backward(expand, way, kernels):
    """x, the raw outputs of the convolutions, and vectors; of the expanded map only where it is kept."""
    positional, named = block((4, 16, 12, 12), hidden=64, out=16, dtype=f32, expand=expand, **way)
    x, *stages = positional
    kept = saved_bytes(lambda: ops.mbconv(*positional, **named), parameters=leaves(x, stages)[1:])
    wide = (64 if way["memory"] == "minimal" else 2 * 64) if expand else 16  # e and d
    channels = 2 * 16 + wide  # and x and p
    maps = channels * x[:, 0].numel() * 4
    vectors = (4 * 64 * 4 + 2 * (2 * 64 + 16) + 17 * 16) * 4  # and the moments of x
    assert maps < sum(kept) <= maps + vectors


def test_the_rule_for_the_expanded_map(kernels):
    """Few channels, in channels_last, have it on chip, if the backend can."""
    can = kernels in EXPAND_DWCONV_GRADIENTS.overloads

    def told(channels, memory, layout=torch.channels_last):
        positional, named = block((2, channels, 6, 5), dtype=f32, out=channels, layout=layout, memory=memory)
        (decision,) = effkernels.explain(ops.mbconv, *positional, **named).decisions
        return decision.remark.removeprefix("expanded map ")

    assert told(32, "default") == ("on chip" if can else "kept")
    assert told(32, "minimal") == ("on chip" if can else "computed again")
    assert told(33, "default") == told(8, "default", torch.contiguous_format) == "kept"
    assert told(33, "minimal") == told(8, "minimal", torch.contiguous_format) == "computed again"


def test_bytes_of_the_forward_pass(kernels):
    """One pass over x for e and one for y; e is written and read once, d written once and read twice, p once each."""
    positional, named = block((4, 16, 12, 12), hidden=64, out=16, dtype=f32)
    x, e = (4 * c * 144 * 4 for c in (16, 64))
    found = count_bytes(lambda: ops.mbconv(*positional, **named))
    passes = 2 * x + 2 * e + 3 * e + 3 * x
    assert passes <= found <= 1.05 * passes


def test_opcheck(way, kernels):
    for variant in ("whole", "no expand", "no gate"):
        positional, named = block(**VARIANTS[variant], **way)
        calls = []
        original = MBCONV.__class__.__call__

        def spy(self, backend, *args, calls=calls, original=original):
            if self is MBCONV:
                calls.append(args)
            return original(self, backend, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MBCONV.__class__, "__call__", spy)
            ops.mbconv(*positional, **named)
        arguments = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in calls[0]]
        torch.library.opcheck(MBCONV.overloads[kernels], tuple(arguments))


def test_compile_with_dynamic_shapes(kernels):
    positional, named = block(dtype=f32)
    torch._dynamo.reset()
    compiled = torch.compile(ops.mbconv, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 5, 4), (3, 3, 8, 9)):
        inputs = (torch.randn(shape, requires_grad=True), *positional[1:])
        results = [f(*inputs, **named) for f in (ops.mbconv, compiled)]
        grads = [torch.autograd.grad(y.square().sum(), leaves(inputs[0], inputs[1:])) for y in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.ones(2, 3, 4)), ValueError, r"x must be 4-dimensional .*, got shape \[2, 3, 4\]"),
        (dict(x=torch.ones(2, 4, 5, 4)), ValueError, r"expand.weight must have shape \[5, 4, 1, 1\]"),
        (dict(x=torch.ones(2, 3, 5, 4).half()), TypeError, "expand.weight must have the dtype of x"),
        (dict(memory="none"), ValueError, "memory must be one of default, minimal, got 'none'"),
        (dict(stride=3), ValueError, r"stride must be one of \(1, 2\), got 3"),
        (dict(stride=2), ValueError, r"residual needs an output like x, \[2, 3, 5, 4\], got \[2, 3, 3, 2\]"),
        (dict(scale=torch.ones(3)), ValueError, r"scale must have shape \[2\], got \[3\]"),
    ],
)
def test_bad_arguments(change, error, message):
    (x, *stages), named = block(dtype=f32)
    arguments = {**named, "x": x, **change}
    with pytest.raises(error, match="mbconv: .*" + message):
        ops.mbconv(arguments.pop("x"), *stages, **arguments)


def test_phases_without_a_cuda_kernel_are_tritons():
    called = set()

    class Phases(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in COMPOSITIONS:
                with self:
                    return COMPOSITIONS[func](*args)
            if func in OPS:
                called.add(str(func).removeprefix("effkernels."))
            return func(*args, **kwargs or {})

    model = nn.Sequential(MBConv(4, 4, expand_ratio=2), MBConv(4, 8, expand_ratio=2))
    with as_on_gpu(), Phases():
        on_meta(model, (2, 4, 8, 8), f32, train=True, backend="cuda").run()
    in_cuda = {"dwconv", "dwconv_backward", "bn_apply", "bn_backward_sums", "se_gate"}
    in_triton = {"pointwise", "pointwise_backward", "bn_pool", "bn_residual", "se_gate_backward"}
    assert called == {f"{name}.cuda" for name in in_cuda} | {f"{name}.triton" for name in in_triton}


def test_auto_needs_triton_for_a_block_on_cuda(monkeypatch):
    monkeypatch.setattr(backends, "VERIFIED", ())
    monkeypatch.setattr(backends, "_warned", {"meta"})
    x = torch.empty(2, 3, 5, 4, device="meta")
    with as_on_gpu(), use_backend("auto"):
        assert backends.choose("mbconv", x, among=MBCONV.kernels) == "cuda"
        monkeypatch.setitem(_native.MISSING, "triton", "triton is not installed")
        with backends.record_decisions() as decisions:
            assert backends.choose("mbconv", x, among=MBCONV.kernels) == "eager"
            assert backends.choose("bn_act", x) == "cuda"
            assert not backends.takes(MBCONV.kernels, x)
    assert decisions[0].rejected["cuda"] == "it runs kernels of triton too: triton is not installed"
