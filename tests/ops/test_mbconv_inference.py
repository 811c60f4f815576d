"""The whole block in one op: every structure, layout, dtype and instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from effkernels import _native, backends, ops, use_backend
from effkernels.ops._cases import assert_close_to_reference, feature_map
from effkernels.ops._layout import empty_map
from effkernels.ops.conv_inference import Convolution
from effkernels.ops.dwconv import Norm
from effkernels.ops.mbconv_inference import Gate, op, pack_block

CPU_BACKENDS = [name for name in ("cpp", "eager") if _native.MISSING.get(name) is None]
needs_cpp = pytest.mark.skipif(_native.MISSING["cpp"] is not None, reason=f"cpp: {_native.MISSING['cpp']}")
LAYOUTS = ("nchw", "channels_last", "sliced nchw", "sliced channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# x, expansion (0: no expand convolution), kernel size, stride, padding, output channels, squeezed channels, activation
BLOCKS = {
    "shortcut": ((2, 16, 14, 14), 6, 3, 1, "auto", 16, 4, "silu"),
    "small map, more outputs than pixels": ((1, 24, 7, 7), 6, 5, 1, "auto", 60, 6, "silu"),
    "odd widths, no gate": ((3, 17, 9, 11), 4, 3, 2, "auto", 13, 0, "hardswish"),
    "no expand, wide rows": ((1, 35, 30, 61), 0, 3, 1, "auto", 16, 8, "silu"),
    "7x7, shortcut": ((2, 40, 10, 10), 3, 7, 1, "auto", 40, 3, "relu6"),
    "wide rows": ((1, 8, 20, 60), 2, 5, 2, "auto", 8, 2, "relu"),
    "one pixel": ((3, 5, 1, 1), 6, 3, 1, "auto", 5, 2, "identity"),
    "same padding": ((1, 8, 13, 12), 4, 5, 2, "same", 8, 2, "silu"),
    "no padding": ((2, 8, 13, 12), 4, 3, 1, 0, 8, 2, "silu"),
    "many panels": ((1, 130, 9, 8), 0, 3, 1, "auto", 200, 2, "silu"),
    "empty batch": ((0, 8, 6, 6), 2, 3, 1, "auto", 8, 2, "silu"),
}


def norm(channels: int, activation: str, dtype: torch.dtype) -> Norm:
    vectors = (
        torch.randn(channels) / 9,
        torch.rand(channels) + 0.5,
        torch.rand(channels) + 0.5,
        torch.randn(channels) / 9,
    )
    return Norm(*(v.to(dtype) for v in vectors), 1e-3, activation)


def convolution(shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> Convolution:
    weight = torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
    return Convolution(weight.to(dtype), norm(shape[0], activation, dtype))


def block(case: str, dtype: torch.dtype = torch.float32, layout: str = "channels_last"):
    """x, the parts of a block, and the window."""
    shape, ratio, k, stride, padding, out, squeezed, activation = BLOCKS[case]
    c, hidden = shape[1], shape[1] * (ratio or 1)
    gate = None
    if squeezed:
        shapes = (squeezed, hidden, 1, 1), (squeezed,), (hidden, squeezed, 1, 1), (hidden,)
        gate = Gate(
            *((torch.randn(s) / s[1:].numel() ** 0.5).to(dtype) for s in map(torch.Size, shapes)), "silu", "sigmoid"
        )
    parts = (
        convolution((hidden, c, 1, 1), activation, dtype) if ratio else None,
        convolution((hidden, 1, k, k), activation, dtype),
        gate,
        convolution((out, hidden, 1, 1), "identity", dtype),
    )
    residual = stride == 1 and out == c and padding == "auto"
    return feature_map(shape, dtype, layout), parts, {"stride": stride, "padding": padding}, residual


def wide(value):
    """The same in float64."""
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(*map(wide, value)) if isinstance(value, tuple) else value


def check(case: str, dtype: torch.dtype, layout: str) -> None:
    x, parts, window, residual = block(case, dtype, layout)
    got = ops.mbconv_inference(x, *parts, **window, residual=residual)
    with use_backend("eager"):
        eager = ops.mbconv_inference(x, *parts, **window, residual=residual)
        exact = ops.mbconv_inference(x.double(), *map(wide, parts), **window, residual=residual)
    assert_close_to_reference(got, eager, exact)
    assert got.stride() == empty_map(x, got.shape).stride()
    if backends.takes(op.MBCONV_PACKED.kernels, x):
        assert torch.equal(pack_block(*parts, **window)(x, residual), got)


@pytest.fixture
def two_threads():
    """Pairs of images are computed whole, one a thread; others in phases."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BLOCKS)
def test_against_eager(case, layout, two_threads):
    for dtype in DTYPES:
        check(case, dtype, layout)


@needs_cpp
@pytest.mark.skipif(_native.introspection is None, reason="needs the introspection module")
def test_every_instruction_set():
    """The same tests on the lesser instruction sets, which are chosen when a process starts."""
    if "EFFKERNELS_CPU_ISA" in os.environ:
        pytest.skip("this is the inner run")
    isas = _native.introspection.available_cpu_isas()
    for isa in isas[: isas.index(_native.introspection.cpu_isa())]:
        inner = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "against_eager and not sliced",
        ]
        result = subprocess.run(
            inner, env={**os.environ, "EFFKERNELS_CPU_ISA": isa}, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{isa}:\n{result.stdout[-4000:]}"
        assert " passed" in result.stdout


@needs_cpp
def test_same_bits_every_time():
    x, parts, window, residual = block("wide rows")
    first, second = (ops.mbconv_inference(x, *parts, **window, residual=residual) for _ in range(2))
    assert torch.equal(first, second)


@needs_cpp
def test_nan_passes_and_stays_in_its_image():
    x, parts, window, residual = block("shortcut")
    x[0, 3, 5, 5] = float("nan")
    y = ops.mbconv_inference(x, *parts, **window, residual=residual)
    assert y[0].isnan().all() and not y[1].isnan().any()


@needs_cpp
@pytest.mark.parametrize("case", ["shortcut", "odd widths, no gate", "no expand, wide rows"])
def test_opcheck(case, monkeypatch):
    """Of the three ops, with the arguments that the public functions give them."""
    x, parts, window, residual = block(case)
    calls = []
    with monkeypatch.context() as patch:
        for found in (op.MBCONV_INFERENCE, op.MBCONV_PACK, op.MBCONV_PACKED):
            overload = found.overloads["cpp"]
            record = lambda *args, overload=overload: (calls.append((overload, args)), overload(*args))[1]  # noqa: E731
            patch.setitem(found.overloads, "cpp", record)
        ops.mbconv_inference(x, *parts, **window, residual=residual)
        pack_block(*parts, **window)(x, residual)
    assert [overload.name() for overload, _ in calls] == [
        f"effkernels::{name}.cpp" for name in ("mbconv_inference", "mbconv_pack", "mbconv_packed")
    ]
    for overload, args in calls:
        torch.library.opcheck(overload, args)


def test_compile_with_dynamic_shapes():
    x, parts, window, residual = block("shortcut")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ops.mbconv_inference(x, *parts, **window, residual=residual),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for size in (14, 9):
        x = x[:, :, :size]
        torch.testing.assert_close(compiled(x), ops.mbconv_inference(x, *parts, **window, residual=residual))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bad_arguments_are_named(backend):
    x, (expand, depthwise, gate, project), window, _ = block("odd widths, no gate")
    gate = Gate(torch.randn(4, 68, 1, 1), None, torch.randn(68, 4, 1, 1), None, "silu", "sigmoid")
    bad = [
        (dict(x=x[:, :5]), ValueError, "x must have 17 channels"),
        (dict(x=x.long()), TypeError, "x must be float32"),
        (
            dict(depthwise=depthwise._replace(weight=depthwise.weight[:, :, :2])),
            ValueError,
            "depthwise.weight must be",
        ),
        (dict(depthwise=depthwise._replace(weight=torch.randn(68, 1, 4, 4))), ValueError, "depthwise.weight must be"),
        (
            dict(expand=expand._replace(weight=expand.weight.half())),
            TypeError,
            "expand.weight must have the dtype of x",
        ),
        (dict(gate=gate._replace(gate="relu")), ValueError, "gate.gate must be one of sigmoid"),
        (dict(gate=gate._replace(expand_weight=gate.reduce_weight)), ValueError, "gate.expand_weight must have shape"),
        (dict(project=project._replace(norm=depthwise.norm)), ValueError, "project.norm.activation must be 'identity'"),
        (dict(residual=True), ValueError, "residual needs an output of the shape of x"),
        (dict(stride=3), ValueError, "stride must be one of"),
    ]
    for change, error, message in bad:
        arguments = dict(x=x, expand=expand, depthwise=depthwise, gate=gate, project=project, **window) | change
        with use_backend(backend), pytest.raises(error, match=message):
            ops.mbconv_inference(**arguments)
