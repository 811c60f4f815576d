"""Argument checks shared by the ops. Every message names the argument, what came and what is accepted."""

from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


_BATCH_NORM = ("bn_weight", "bn_bias", "running_mean", "running_var")


def map_tensor(op: str, name: str, x: Tensor) -> None:
    """`x` is a floating-point feature map [N, C, H, W] with a positive number of channels and pixels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor [N, C, H, W], got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be 4-dimensional [N, C, H, W], got shape {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{op}: {name} must have at least one channel, row and column, got shape {list(x.shape)}")


# What follows is asked some twenty times per block and call: the tests that pass come first and build nothing.
def shaped(op: str, name: str, tensor: Tensor | None, shape: Iterable[int], like: Tensor) -> None:
    """`tensor`, if given, has `shape` and lies on the device of `like`."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != (expected := tuple(shape)):
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as x is, got {tensor.device}")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {tensor.dtype}")


def same_dtype(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def parameter_dtype(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """A per-channel parameter has the dtype of `x`; beside 16-bit maps float32 is accepted too."""
    if tensor.dtype == x.dtype:
        return
    accepted = [x.dtype] if x.dtype.itemsize > 2 else [x.dtype, torch.float32]
    if tensor.dtype not in accepted:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, accepted))} as x is, got {tensor.dtype}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts the arguments of a convolution of x to; None where it leaves them alone."""
    if autocasts(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def autocasts(device: str) -> bool:
    # As torch.amp.is_autocast_available says, which torch.compile cannot trace in PyTorch 2.11.
    return device in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device)


def code(op: str, name: str, value: str, accepted: dict[str, int]) -> int:
    """The code of an activation or gate given by name."""
    if value not in accepted:
        raise ValueError(f"{op}: {name} must be one of {', '.join(accepted)}, got {value!r}")
    return accepted[value]


def batch_norm(
    op: str,
    x: Tensor,
    channels: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> None:
    """The tensors of a BatchNorm over `channels` channels are complete and float32 or of the dtype of `x`."""
    shape = (channels,)
    for name, tensor in zip(_BATCH_NORM, (weight, bias, running_mean, running_var), strict=True):
        if tensor is not None:
            shaped(op, name, tensor, shape, x)
            parameter_dtype(op, name, tensor, x)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var must both be tensors or both be None")
    if not training and running_mean is None:
        raise ValueError(f"{op}: running_mean and running_var must be tensors when training=False, got None")


def more_than_one_value(op: str, count: int, shape: Iterable[int]) -> None:
    """Batch statistics of one value per channel are refused, as PyTorch does."""
    if count == 1:
        raise ValueError(f"{op}: expected more than 1 value per channel when training, got input size {list(shape)}")
