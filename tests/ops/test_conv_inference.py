"""A dense convolution, BatchNorm, activation and shortcut in one op, on every layout, dtype and instruction set."""

import os
import subprocess
import sys

import pytest
import torch

from effkernels import _native, ops, use_backend
from effkernels.ops._cases import assert_close_to_reference, feature_map
from effkernels.ops._layout import empty_map
from effkernels.ops.conv_inference import Convolution, op, pack_convolution
from effkernels.ops.dwconv import Norm

needs_cpp = pytest.mark.skipif(_native.MISSING["cpp"] is not None, reason=f"cpp: {_native.MISSING['cpp']}")
LAYOUTS = ("nchw", "channels_last", "sliced nchw", "sliced channels_last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# x, output channels, kernel, stride, padding, activation, shortcut
LAYERS = {
    "stem": ((2, 3, 17, 19), 20, (3, 3), 2, "auto", "silu", False),
    "same padding": ((1, 3, 16, 12), 8, (3, 3), 2, "same", "silu", False),
    "shortcut": ((1, 24, 30, 33), 24, (3, 3), 1, "auto", "identity", True),
    "1x1 with many outputs": ((1, 40, 7, 7), 130, (1, 1), 1, "auto", "hardswish", True),
    "1x1, stride": ((2, 17, 9, 9), 17, (1, 1), 2, 0, "relu", False),
    "5x5": ((1, 5, 6, 7), 9, (5, 5), 1, "auto", "relu6", True),
    "1x3": ((2, 6, 5, 9), 7, (1, 3), 1, 1, "silu", False),
    "wide rows": ((1, 20, 5, 150), 48, (1, 1), 1, 0, "silu", True),
    "wide rows, 3x3": ((3, 20, 5, 150), 7, (3, 3), 2, 0, "silu", False),
    "more padding than window": ((1, 4, 9, 9), 8, (3, 3), 1, 4, "silu", False),
    "3x3, odd sizes": ((2, 17, 7, 9), 50, (3, 3), 1, "auto", "silu", True),
    "3x3, one pixel": ((1, 16, 1, 1), 16, (3, 3), 1, "auto", "relu", False),
    "3x3, many rows of tiles": ((1, 48, 38, 75), 64, (3, 3), 1, "auto", "silu", False),
    "3x3, odd depth": ((2, 45, 6, 7), 33, (3, 3), 1, "auto", "silu", True),
    "empty batch": ((0, 5, 6, 7), 9, (3, 3), 1, "auto", "silu", True),
}


def layer(case: str, dtype: torch.dtype = torch.float32, layout: str = "channels_last"):
    """x, the convolution, the window, the shortcut."""
    shape, out, kernel, stride, padding, activation, shortcut = LAYERS[case]
    weight = torch.randn(out, shape[1], *kernel) / (shape[1] * kernel[0] * kernel[1]) ** 0.5
    vectors = (v.to(dtype) for v in (torch.randn(out), torch.rand(out) + 0.5, torch.randn(out), torch.randn(out)))
    convolution = Convolution(weight.to(dtype), Norm(*vectors, 1e-3, activation))
    added = feature_map((shape[0], out, *shape[2:]), dtype, layout) if shortcut else None
    return feature_map(shape, dtype, layout), convolution, {"stride": stride, "padding": padding}, added


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LAYERS)
def test_against_eager(case, layout):
    for dtype in DTYPES:
        x, convolution, window, shortcut = layer(case, dtype, layout)
        got = ops.conv_bn_act(x, convolution, **window, shortcut=shortcut)
        wide = Convolution(
            convolution.weight.double(), Norm(*(t.double() for t in convolution.norm[:4]), 1e-3, convolution.norm[-1])
        )
        with use_backend("eager"):
            eager = ops.conv_bn_act(x, convolution, **window, shortcut=shortcut)
            exact = ops.conv_bn_act(
                x.double(), wide, **window, shortcut=None if shortcut is None else shortcut.double()
            )
        assert_close_to_reference(got, eager, exact)
        assert got.stride() == empty_map(x, got.shape).stride()
        assert torch.equal(pack_convolution(convolution, **window)(x, shortcut), got)


@needs_cpp
@pytest.mark.skipif(_native.introspection is None, reason="needs the introspection module")
def test_every_instruction_set():
    """The same tests on the lesser instruction sets, which are chosen when a process starts."""
    if "EFFKERNELS_CPU_ISA" in os.environ:
        pytest.skip("this is the inner run")
    isas = _native.introspection.available_cpu_isas()
    select = ["-k", "against_eager and not sliced"]
    for isa in isas[: isas.index(_native.introspection.cpu_isa())]:
        inner = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, *select]
        result = subprocess.run(
            inner, env={**os.environ, "EFFKERNELS_CPU_ISA": isa}, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{isa}:\n{result.stdout[-4000:]}"
        assert " passed" in result.stdout


@needs_cpp
def test_same_bits_with_every_thread_count():
    x, convolution, window, shortcut = layer("1x1 with many outputs")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.conv_bn_act(x, convolution, **window, shortcut=shortcut))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_cpp
def test_opcheck():
    x, (weight, norm), _, shortcut = layer("shortcut")
    call = (shortcut, 1, 1, 1, 1, 30, 33)
    torch.library.opcheck(op.CONV_INFERENCE.overloads["cpp"], (x, weight, *norm[:5], *call))
    torch.library.opcheck(op.CONV_PACK.overloads["cpp"], (weight, *norm[:5], call[2]))
    packed = op.CONV_PACK("cpp", weight, *norm[:5], call[2])
    torch.library.opcheck(op.CONV_PACKED.overloads["cpp"], (x, packed, *weight.shape[::2], 3, *call))


def test_bad_arguments_are_named():
    x, convolution, _, _ = layer("stem")
    weight, norm = convolution
    bad = [
        (dict(x=x[:, :2]), ValueError, "convolution.weight must have shape"),
        (dict(x=x.double()), TypeError, "convolution.weight must have the dtype of x"),
        (dict(convolution=Convolution(weight[0], norm)), ValueError, "convolution.weight must be"),
        (dict(shortcut=x), ValueError, "shortcut must have shape"),
        (dict(padding="valid"), TypeError, "padding must be an int"),
        (
            dict(convolution=Convolution(weight, norm._replace(activation="gelu"))),
            ValueError,
            "activation must be one of",
        ),
    ]
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            ops.conv_bn_act(**dict(x=x, convolution=convolution, stride=2) | change)
