"""The CUDA backend on CPU tensors: its launchers as they are, its kernels compiled to PTX and executed by ptxrun.

Inside `installed()` the phase ops `effkernels::<op>.cuda` take CPU tensors.
"""

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from cuda_on_cpu import library
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effkernels import _build, _native

FOLDER = os.environ.get("EFFKERNELS_PTXRUN")
if FOLDER:
    sys.path.insert(0, FOLDER)
    import ptxrun

LAUNCHER = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)

arch = "sm_80"
options: dict[str, Any] = {"race": True}  # of ptxrun's Module.run
launches: list["Launch"] = []


class Launch(NamedTuple):
    kernel: str
    result: Any  # ptxrun's
    tensors: dict[int, str]  # that its parameters point to: by address, their names in the result's profile


def why_not() -> str | None:
    """Why nothing can be emulated here, or None."""
    if not FOLDER:
        return "EFFKERNELS_PTXRUN does not name the folder that holds ptxrun/"
    if ptxrun.find_nvcc() is None:
        return "no nvcc"
    return library.why_not()


@functools.cache
def texts(arch: str) -> list[str]:
    """The PTX of each csrc/*/cuda_kernel.cu: all kernels that there are."""
    flags = (*_build.INCLUDES, "--expt-relaxed-constexpr")
    return [ptxrun.compile_cu(str(source), arch, flags=flags) for source in _build.sources("*/cuda_kernel.cu")]


@functools.cache
def modules(arch: str) -> list[Any]:
    return [ptxrun.Module(text) for text in texts(arch)]


def run(kernel: str, grid: int, block: int, shared: int, params: bytes, tensors: list[Tensor]) -> None:
    module = next(module for module in modules(arch) if kernel in module.entries())
    arguments = unpack(params, tensors)
    result = module.run(kernel, grid, block, [arguments], shared, **options)
    assert not result.warnings, result.warnings[:3]
    names = {value.data_ptr(): f"arg0.{i}" for i, (_, value) in enumerate(arguments) if isinstance(value, Tensor)}
    launches.append(Launch(kernel, result, names))


def unpack(params: bytes, tensors: list[Tensor]) -> list[tuple[str, Any]]:
    """The struct as ptxrun takes it: the words that are a tensor's address become that tensor."""
    by_address = {t.data_ptr(): t for t in tensors if t.numel()}
    whole = len(params) // 8 * 8
    words = [("P", by_address[w]) if w in by_address else ("Q", w) for (w,) in struct.iter_unpack("Q", params[:whole])]
    return words + [("B", byte) for byte in params[whole:]]


class _Tensors(TorchDispatchMode):
    """Keeps every tensor that is made meanwhile, beside those of `arguments`: all that a kernel may reach."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.all = [a for a in arguments if isinstance(a, Tensor)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.all += [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        return made


@contextmanager
def installed(execute: Any = run) -> Iterator[ctypes.CDLL]:
    """Gives every launch to `execute`. Yields the library, which has the emulated GPU's controls."""
    reached: list[Tensor] = []
    failures: list[BaseException] = []

    @LAUNCHER
    def launch(kernel: bytes, grid: int, block: int, shared: int, params: int, size: int) -> None:
        try:
            execute(kernel.decode(), grid, block, shared, ctypes.string_at(params, size), reached)
        except BaseException as failure:  # C++ has no way to pass it on
            failures.append(failure)

    @contextmanager
    def around(arguments: tuple[Any, ...]) -> Iterator[None]:
        nonlocal reached
        with _Tensors(arguments) as tensors:
            reached = tensors.all
            yield
        if failures:
            raise failures.pop()

    launchers = _native.launchers
    loaded, registrations = library.install(library.build("-O0"), around)
    loaded.cuda_on_cpu_set_launcher(launch)
    try:
        yield loaded
    finally:
        registrations._destroy()
        _native.launchers = launchers
