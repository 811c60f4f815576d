import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float


def _rounded(data, source, target, rounding_mode):
    """float32 to bfloat16, to nearest even as the GPU rounds; Triton's interpreter cuts off."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(data, source, target, rounding_mode)
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)


_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot(builder, a, b, *args):
    """Of bfloat16 too, which Triton's interpreter multiplies as integers."""
    return _create_dot(builder, _widened(a), _widened(b), *args)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    monkeypatch.setattr(interpreter, "_convert_float", _rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
