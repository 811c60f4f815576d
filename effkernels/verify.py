"""Whether kernels are right on this machine: run on the cases of effkernels/ops/*/cases.py, held against float64.

`auto` takes a GPU kernel only where that was found on the GPU at hand, with this version of the package: on the first
use, by a few cases of each op, or by `effkernels doctor --verify`, by many. The verdict is kept in the user's cache.
"""

import functools
import hashlib
import importlib
import pathlib
import platform
import threading
import warnings
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch

from effkernels import _build, _cache, _native

if TYPE_CHECKING:
    from effkernels.ops._cases import Case

NOT_CHECKED = "its kernels were not checked on this device yet: run `effkernels doctor --verify`"


@dataclass
class Verdict:
    """How many cases a backend computed on a device, and of each op that was wrong there, the first case and how."""

    cases: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def add(self, backend: str, device: str, case: "Case") -> None:
        self.cases[case.op.name] = self.cases.get(case.op.name, 0) + 1
        try:
            case.check(backend, device)
        except Exception as error:  # whatever it is, the kernel did not give its answer
            self.wrong.setdefault(case.op.name, str(error) or type(error).__name__)


_verdicts: dict[tuple[str, str], Verdict] = {}
_warned: set[tuple[str, str]] = set()


def why_not(backend: str, device: str, tracing: bool) -> str | None:
    """Why `auto` must not take `backend` on `device`; None once its kernels were found right there.

    The first call checks them, except while a compiler traces or a CUDA graph captures.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "there is no GPU to check its kernels on"  # a fake tensor
    verdict = _verdicts.get((backend, device)) or load(backend, device)
    if verdict is None and not (tracing or is_capturing()):
        verdict = _first_use(backend, device)
    if verdict is None:
        return _warned_once(backend, device, NOT_CHECKED)
    _verdicts[backend, device] = verdict
    if verdict.wrong:
        return _warned_once(backend, device, f"set aside: {'; '.join(verdict.wrong.values())}")
    return None


# What torch._dynamo.assume_constant_result does, whose import would take a second.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_capturing() -> bool:
    """Whether this thread captures a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _warned_once(backend: str, device: str, reason: str) -> str:
    if (backend, reason) not in _warned:
        _warned.add((backend, reason))
        warnings.warn(f"effkernels runs without its {backend} kernels on {device}: {reason}", stacklevel=2)
    return reason


def _first_use(backend: str, device: str) -> Verdict:
    from effkernels.ops._cases import cases_for

    # Of each op one case for each dtype and layout: a kernel that Triton has to compile takes half a second.
    chosen = {(c.op.name, c.dtype, str(c).count("channels_last")): c for c in cases_for(backend, "core")}
    verdict = Verdict()

    def check() -> None:
        for case in chosen.values():
            verdict.add(backend, device, case)

    # A thread of its own has none of the caller's modes, autocast, default device or stream.
    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    save(backend, device, verdict)
    return verdict


def load(backend: str, device: str) -> Verdict | None:
    """The verdict of an earlier process."""
    content = _cache.load(*_place(backend, device))
    return None if content is None else Verdict(**content)


def save(backend: str, device: str, verdict: Verdict) -> None:
    _verdicts[backend, device] = verdict
    _cache.save(asdict(verdict), f"the verdict on its {backend} kernels", *_place(backend, device))


def _place(backend: str, device: str) -> tuple[str, ...]:
    return "verified", backend, device_name(device), version()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else platform.machine()


@functools.cache
def version() -> str:
    """What the kernels were made of: their sources and the compilers."""
    sources = sorted([pathlib.Path(__file__), *(_build.PACKAGE / "ops").rglob("*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    built = _native.introspection.build_info() if _native.introspection else {}
    triton = None if _native.MISSING["triton"] else importlib.import_module("triton").__version__
    return (
        f"{_build.source_hash()} {digest} {torch.__version__} {triton} {built.get('nvcc')} {built.get('cuda_arches')}"
    )
