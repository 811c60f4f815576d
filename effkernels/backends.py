"""Which implementation of an op runs: one list of conditions, each with its reason.

`eager` is plain PyTorch, `cpp` C++ on the CPU, `cuda` C++ on the GPU, `triton` Triton on the GPU;
`auto` takes the first of `PREFERENCE` that can run and, on a GPU, was found right there (verify.py).
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from effkernels import _native, verify

PREFERENCE = ("cpp", "cuda", "triton", "eager")
VERIFIED = ("cuda", "triton")  # by `verify`, before `auto` takes them: the code may be older than the GPU
NAMES = ("auto", *PREFERENCE)
# What an op runs on each backend that has it: kernels of that backend, and maybe of others too. As `Op.kernels`.
Kernels = Mapping[str, Sequence[str]]
OWN: Kernels = {name: (name,) for name in PREFERENCE}
NO_KERNELS = "it has no kernels for this op"
DTYPES = {
    "cpp": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}
DEVICES: dict[str, tuple[str, ...]] = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}

if os.environ.get("EFFKERNELS_TRITON_ON_CPU", "0") == "1":
    # For tests on a machine with no GPU: Triton's interpreter, or an emulated driver, takes CPU tensors.
    DEVICES["triton"] = ("cuda", "cpu")

_requested = "auto"
_warned: set[str] = set()


@dataclass(frozen=True)
class Decision:
    """What `choose` decided for one call of an op, and why not the others."""

    op: str
    backend: str
    kernels: Sequence[str]  # of these backends
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rejected: dict[str, str] = field(default_factory=dict)
    remark: str = ""  # which way of several the kernels take

    def __str__(self) -> str:
        shape, kernels = "x".join(map(str, self.shape)), ", ".join(self.kernels)
        why = "".join(f"\n    not {name}: {reason}" for name, reason in self.rejected.items())
        call = f"{self.op} {shape} {str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"{call}: {kernels} {self.remark}".rstrip() + why


_decisions: list[Decision] | None = None


def why_not(backend: str, x: Tensor) -> str | None:
    """The reason why `backend` cannot run on `x`; None if it can."""
    if backend == "eager":
        return None
    missing = _native.MISSING.get(backend)
    if missing is not None:
        return missing
    if x.device.type not in DEVICES[backend]:
        return f"runs on {' or '.join(DEVICES[backend])} tensors, got one on {x.device.type}"
    if x.dtype not in DTYPES[backend]:
        return f"has no {x.dtype} kernels"
    return None


def trains_slower(x: Tensor) -> str | None:
    """Why `auto` leaves the training of modules on `x` to PyTorch (docs/h100.md); None if it does not."""
    if _requested != "auto" or x.device.type != "cuda":
        return None
    return "a training step was slower than PyTorch's when it was last measured on a GPU; use_backend takes it anyway"


def takes(op: Kernels, x: Tensor) -> bool:
    """Whether `choose` takes a backend that has the op of these kernels, on `x`."""
    if _requested != "auto":
        return _requested in op and _why_not(_requested, x, op) is None
    return _first_that_can(x, op)[0] in op


def _why_not(backend: str, x: Tensor, op: Kernels, verified: bool = False) -> str | None:
    """The reason why `backend` cannot run the op of these kernels on `x`; if they must be `verified`, also of that."""
    if backend not in op:
        return why_not(backend, x) or (None if backend == "eager" else NO_KERNELS)
    for owner in op[backend]:
        reason = why_not(owner, x)
        if reason is None and verified and owner in VERIFIED:
            reason = verify.why_not(owner, str(x.device), torch.compiler.is_compiling())
        if reason is not None:
            return reason if owner == backend else f"it runs kernels of {owner} too: {reason}"
    return None


def _first_that_can(x: Tensor, op: Kernels) -> tuple[str, dict[str, str]]:
    """What `auto` takes for the op of these kernels, and why not those that it prefers."""
    refused: dict[str, str] = {}
    for backend in PREFERENCE:
        reason = _why_not(backend, x, op, verified=True)
        if reason is None:
            break
        refused[backend] = reason
    return backend, refused


def choose(op: str, x: Tensor, obstacle: object = None, among: Kernels = OWN) -> str:
    """The backend that runs `op` on `x`: `eager` if there is an `obstacle`, a reason that holds for every kernel.

    It is `among` those that have the op.

    Raises RuntimeError if the backend that `use_backend` asked for cannot run it.
    """
    refused: dict[str, str] = {}
    if obstacle is not None:
        backend = "eager"
    elif _requested != "auto":
        reason = _why_not(_requested, x, among)
        if reason is not None:
            raise RuntimeError(f"effkernels.{op}: backend {_requested!r} cannot run: {reason}")
        backend = _requested
    else:
        backend, refused = _first_that_can(x, among)
        if backend == "eager" and not torch.compiler.is_compiling():
            _warn_slow(x, refused)
    if _decisions is not None:
        others = [name for name in PREFERENCE if name != backend]
        reasons = {name: obstacle or refused.get(name) or _why_not(name, x, among) for name in others}
        rejected = {name: str(reason) for name, reason in reasons.items() if reason is not None}
        kernels = among.get(backend, (backend,))
        _decisions.append(Decision(op, backend, kernels, tuple(x.shape), x.dtype, x.device, rejected))
    return backend


def remark(text: str) -> None:
    """Tell `explain` more of the last decision."""
    if _decisions:
        before = _decisions[-1].remark
        _decisions[-1] = replace(_decisions[-1], remark=f"{before}; {text}" if before else text)


def _warn_slow(x: Tensor, refused: dict[str, str]) -> None:
    if x.device.type in _warned:
        return
    _warned.add(x.device.type)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    warnings.warn(
        f"effkernels runs unfused on {x.device.type} ({reasons}). `effkernels doctor` says what is missing; "
        'effkernels.use_backend("eager") silences this.',
        stacklevel=4,
    )


class use_backend:
    """Choose the backend of every op: at once for the process, and as a context manager until its end.

    >>> effkernels.use_backend("cpp")
    >>> with effkernels.use_backend("eager"):
    ...     reference = model(x)

    The setting belongs to the process, not to a thread. A backward pass runs on the backend of its forward pass.

    Raises:
        ValueError: `name` is not one of auto, eager, cpp, triton, cuda.
    """

    def __init__(self, name: str) -> None:
        global _requested
        if name not in NAMES:
            raise ValueError(f"use_backend: name must be one of {', '.join(NAMES)}, got {name!r}")
        self._previous = _requested
        _requested = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _requested
        _requested = self._previous


@contextmanager
def record_decisions() -> Iterator[list[Decision]]:
    """Collect the decisions of all op calls made inside the block."""
    global _decisions
    previous, _decisions = _decisions, []
    try:
        yield _decisions
    finally:
        _decisions = previous
