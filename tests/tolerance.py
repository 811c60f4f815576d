"""How close is close enough, defined once."""

import torch
from torch import Tensor

FLOOR_ULPS = 4


def assert_close_to_reference(got: Tensor, eager_same_dtype: Tensor, reference64: Tensor) -> None:
    """`got` is as close to the float64 reference as eager PyTorch in the same dtype is, within a factor of two.

    Closeness is the relative L2 error over the finite values; NaN and infinities stand where the reference has them.
    A floor of a few ulps of the dtype of `got` covers cases that eager happens to compute exactly.
    """
    assert got.shape == reference64.shape, f"shape {list(got.shape)}, expected {list(reference64.shape)}"
    assert got.dtype == eager_same_dtype.dtype, f"dtype {got.dtype}, expected {eager_same_dtype.dtype}"
    # A value that the dtype cannot hold is an infinity in it.
    rounded = reference64.to(got.dtype)
    finite = rounded.isfinite()
    torch.testing.assert_close(got[~finite], rounded[~finite], rtol=0, atol=0, equal_nan=True)
    got, eager_same_dtype, reference64 = got.detach(), eager_same_dtype.detach(), reference64.detach()
    error, allowed = (_relative_error(t[finite], reference64[finite]) for t in (got, eager_same_dtype))
    allowed = 2 * allowed + FLOOR_ULPS * torch.finfo(got.dtype).eps
    assert error <= allowed, f"relative L2 error {error:.3g}, allowed {allowed:.3g}"


def _relative_error(value: Tensor, reference: Tensor) -> float:
    error = (value.double() - reference).norm()
    return float(error / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))
