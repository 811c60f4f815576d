"""The end of a block, `bn_project`, on every backend that has it."""

import pytest
import torch
from torch import Tensor

from effkernels import backends, use_backend
from effkernels.ops._op import Op
from effkernels.ops.bn_project import Stage, bn_project
from effkernels.ops.bn_project.op import BN_PROJECT
from effkernels.ops.mbconv_inference import Gate
from effkernels.profiling.saved import saved_bytes

f32, f64 = torch.float32, torch.float64
BACKENDS = [
    name
    for name in BN_PROJECT.overloads
    if "cpu" in backends.DEVICES[name] and backends.why_not(name, torch.empty(1)) is None
]
VARIANTS = {
    "whole": dict(se=True, scale=True, residual=True),
    "plain": dict(),
    "gate": dict(se=True),
    "fixed": dict(training=(False, True), residual=True),
    "all fixed": dict(training=(False, False), se=True, bias=True),
    "bias": dict(bias=True, scale=True),
}


@pytest.fixture(params=BACKENDS)
def kernels(request):
    with use_backend(request.param):
        yield request.param


def arguments(
    shape=(3, 5, 4, 3), out=4, training=(True, True), se=False, bias=False, scale=False, residual=False, dtype=f64,
    layout=torch.contiguous_format,
):  # fmt: skip
    """Positional and named arguments, and those that require a gradient."""
    n, channels = shape[:2]
    found: list[Tensor] = []

    def leaf(*sizes, offset=0.0):
        found.append((torch.randn(sizes, dtype=dtype) / sizes[-1] ** 0.5 + offset).requires_grad_())
        return found[-1]

    def norm(size):
        return leaf(size, offset=1.0), leaf(size), torch.randn(size, dtype=dtype), torch.rand(size, dtype=dtype) + 0.5

    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    found.append(x)
    before = norm(channels)
    gate = None
    if se:
        weights = [leaf(*sizes) for sizes in ((2, channels, 1, 1), (2,), (channels, 2, 1, 1), (channels,))]
        gate = Gate(*weights, "silu", "sigmoid")
    weight = leaf(out, channels, 1, 1)
    project = Stage(weight, leaf(out) if bias else None, *norm(out), training[1], 0.1, 1e-3, "identity")
    shortcut = None
    if residual:
        shortcut = torch.randn(n, out, *shape[2:], dtype=dtype).contiguous(memory_format=layout).requires_grad_()
        found.append(shortcut)
    factors = torch.tensor([0.0, 1.25, 2.0], dtype=dtype)[:n] if scale else None
    return (x, *before, gate, project), dict(training=training[0], scale=factors, residual=shortcut), found


def gradients(positional, named, wanted):
    y = bn_project(*positional, **named)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, torch.autograd.grad((y * weights).sum(), wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, layout, kernels):
    positional, named, leaves = arguments(layout=layout, **VARIANTS[variant])
    assert torch.autograd.gradcheck(lambda *_: bn_project(*positional, **named), leaves, fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_eager(variant, kernels):
    positional, named, leaves = arguments(**VARIANTS[variant])
    buffers = [*positional[3:5], positional[6].running_mean, positional[6].running_var]
    start = [b.clone() for b in buffers]
    got = gradients(positional, named, leaves), [b.clone() for b in buffers]
    for buffer, before in zip(buffers, start, strict=True):
        buffer.copy_(before)
    with use_backend("eager"):
        torch.testing.assert_close(got, (gradients(positional, named, leaves), buffers))


def test_only_the_gradients_asked_for(kernels):
    positional, named, leaves = arguments(**VARIANTS["whole"])
    _, expected = gradients(positional, named, leaves)
    for leaf, grad in zip(leaves, expected, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        torch.testing.assert_close(gradients(positional, named, [leaf])[1][0], grad)


def test_saved_for_backward(kernels):
    """x, the raw output of the projection, and vectors; the shortcut is not kept."""
    positional, named, leaves = arguments((4, 64, 12, 12), 16, se=True, residual=True, dtype=f32)
    parameters = [t for t in leaves if t is not positional[0]]
    kept = saved_bytes(lambda: bn_project(*positional, **named), parameters=parameters)
    maps = (64 + 16) * 4 * 144 * 4
    assert maps < sum(kept) <= maps + (4 * 4 * 64 + 2 * (64 + 16)) * 4


def test_opcheck(kernels, monkeypatch):
    calls, original = [], Op.__call__

    def spy(self, backend, *args):
        if self is BN_PROJECT:
            calls.append(args)
        return original(self, backend, *args)

    monkeypatch.setattr(Op, "__call__", spy)
    for variant in ("whole", "all fixed"):
        positional, named, _ = arguments(**VARIANTS[variant])
        bn_project(*positional, **named)
        values = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in calls.pop()]
        torch.library.opcheck(BN_PROJECT.overloads[kernels], tuple(values))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.ones(2, 3, 4)), ValueError, r"x must be 4-dimensional .*, got shape \[2, 3, 4\]"),
        (dict(scale=torch.ones(2)), ValueError, r"scale must have shape \[3\], got \[2\]"),
        (dict(residual=torch.ones(3, 5, 4, 3)), ValueError, r"residual must have shape \[3, 4, 4, 3\], got"),
        (dict(residual=torch.ones(3, 4, 4, 3).half()), TypeError, "residual must have the dtype of x"),
        (dict(activation="gelu"), ValueError, "activation must be one of identity, .* got 'gelu'"),
    ],
)
def test_bad_arguments(change, error, message):
    (x, *rest), named, _ = arguments(dtype=f32)
    given = {**named, "x": x, **change}
    with pytest.raises(error, match="bn_project: .*" + message):
        bn_project(given.pop("x"), *rest, **given)
