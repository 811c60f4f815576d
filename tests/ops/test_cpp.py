"""The C++ CPU kernels: every phase op, on every instruction set that this machine has."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from strategies import drawn_cases

from effkernels import _build, _native
from effkernels.ops._activation import Activation
from effkernels.ops._cases import cases_for, feature_map
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv.op import DWCONV, NO_NORM

pytestmark = pytest.mark.skipif(_native.MISSING["cpp"] is not None, reason=f"cpp: {_native.MISSING['cpp']}")


@pytest.mark.parametrize("case", cases_for("cpp"), ids=str)
def test_case(case):
    case.check("cpp")


@settings(max_examples=300)
@given(drawn_cases("cpp"))
def test_drawn_case(case):
    case.check("cpp")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_16_bits(dtype):
    """Every 16-bit value survives, and values between two of them go to the nearest even, as PyTorch rounds."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, 1, -1)
    ones = torch.ones(1, 1, dtype=torch.float32)
    torch.testing.assert_close(
        torch.ops.effkernels.channel_scale.cpp(every, ones), every, rtol=0, atol=0, equal_nan=True
    )
    factor = torch.full((1, 1), 1 + 2.0**-9)
    expected = (every.float() * factor.view(1, 1, 1, 1)).to(dtype)
    torch.testing.assert_close(
        torch.ops.effkernels.channel_scale.cpp(every, factor), expected, rtol=0, atol=0, equal_nan=True
    )


def test_same_bits_every_time_and_with_every_thread_count():
    x, weight = feature_map((3, 40, 33, 35)), torch.randn(40, 1, 5, 5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 4, 4):
            torch.set_num_threads(count)
            for layout in (torch.contiguous_format, torch.channels_last):
                arguments = (x.contiguous(memory_format=layout), weight, *NO_NORM, *norm_of_zero(40))
                results.append(DWCONV("cpp", *arguments, 1, 2, 2, 33, 35, Reduce.STATISTICS))
    finally:
        torch.set_num_threads(threads)
    for first, other in zip(results[:2] * 3, results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def norm_of_zero(channels):
    return torch.zeros(channels), torch.ones(channels), None, None, 1e-5, Activation.SILU


@pytest.mark.skipif(_native.introspection is None, reason="needs the introspection module")
def test_every_instruction_set():
    """The same tests on the lesser instruction sets, which are chosen when a process starts."""
    if "EFFKERNELS_CPU_ISA" in os.environ:
        pytest.skip("this is the inner run")
    # What some add to avx512, products of bfloat16, these tests are not about.
    isas = [isa for isa in _native.introspection.available_cpu_isas() if isa not in _build.BFLOAT16_ISAS]
    for isa in isas[:-1]:
        inner = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        result = subprocess.run(
            inner, env={**os.environ, "EFFKERNELS_CPU_ISA": isa}, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{isa}:\n{result.stdout[-4000:]}"
        assert " passed" in result.stdout
