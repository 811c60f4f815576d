"""The CUDA backend compiled for the CPU: its launchers and kernels, with include/cuda_runtime.h in place of CUDA."""

import ctypes
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from effkernels import _build, _native
from effkernels.ops._cases import all_cases

FOLDER = pathlib.Path(__file__).parent
FLAGS = [
    *("-std=c++17", "-g1", "-fPIC", "-march=native", "-Wall", "-Wextra", "-Werror"),
    # CUDA defines what C++ leaves undefined: a vector's bits may be read as other types.
    *("-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-subobject-linkage"),
    *(f"-I{FOLDER / 'include'}", *_build.INCLUDES),
]
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def why_not() -> str | None:
    """Why this cannot be built here, or None."""
    if sys.platform != "linux":
        return "needs Linux"
    tools = _build._tools()
    return tools if isinstance(tools, str) else None


def build(*flags: str) -> pathlib.Path:
    """The library, compiled with `flags`; what has not changed since the last time is kept."""
    tools = _build._tools()
    assert isinstance(tools, _build.Tools)
    work = _build._writable_home() / "cuda_on_cpu" / (_build._sha256(" ".join(flags).encode())[:8])
    torch_folder = pathlib.Path(torch.__file__).parent
    glue = ["-DUSE_CUDA", *_build.STABLE_ABI, "-isystem", str(torch_folder / "include")]
    objects, library = [], "libcuda_on_cpu.so"
    lines = [
        *("rule cxx", f"  command = {tools.cxx} $flags -MMD -MF $out.d -x c++ -c $in -o $out"),
        *("  depfile = $out.d", "  deps = gcc"),
        # -Bsymbolic: what runtime.cpp has in libtorch_cuda's place comes first.
        *("rule link", f"  command = {tools.cxx} -shared -Wl,-Bsymbolic $flags $in -o $out $libraries"),
    ]
    for source in [*_build.sources("*/cuda_kernel.cu"), *_build.sources("*/cuda.cpp"), FOLDER / "runtime.cpp"]:
        objects.append(f"{source.parent.name}.{source.name}.o")
        # The launchers' tensors are PyTorch's, whose headers are compiled best unoptimised.
        extra = flags if source.suffix == ".cu" else [*flags, "-O0", *glue]
        lines += [f"build {objects[-1]}: cxx {source}", f"  flags = {shlex.join([*FLAGS, *extra])}"]
    lines += [f"build {library}: link {' '.join(objects)}", f"  flags = {shlex.join(flags)}"]
    lines += [f"  libraries = -L{torch_folder / 'lib'} -ltorch_cpu", f"default {library}"]
    with _build._lock(work):
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        result = subprocess.run([tools.ninja, "-C", str(work)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:]
    return work / library


def sanitized_environment(library: pathlib.Path) -> dict[str, str]:
    """Of a Python process that is to load a library built with `SANITIZERS`."""
    tools = _build._tools()
    assert isinstance(tools, _build.Tools)
    runtime = subprocess.run([tools.cxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return os.environ | {
        "LD_PRELOAD": runtime.stdout.strip(),
        # Fresh memory is NaN, as in tests/conftest.py, whose way the sanitiser's malloc does not know.
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",
        "EFFKERNELS_CUDA_ON_CPU": str(library),
        "OMP_NUM_THREADS": "1",
    }


def install(
    library: pathlib.Path, around: Callable[[tuple[Any, ...]], AbstractContextManager[None]] = nullcontext
) -> tuple[ctypes.CDLL, torch.library.Library]:
    """Load `library`; the `cuda` overloads of its ops then take CPU tensors, as long as what is returned lives.

    Each call is made inside `around(arguments)`.
    """
    loaded = _native.launchers = ctypes.CDLL(str(library))
    registrations = torch.library.Library("effkernels", "IMPL")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op in {case.op for case in all_cases() if "cuda" in case.op.overloads}:
        overload = op.overloads["cuda"]
        if torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CUDA"):

            def call(*args: Any, overload: Any = overload) -> Any:
                with around(args):
                    return overload.redispatch(keys, *args)

            registrations.impl(f"{op.name}.cuda", call, "CPU")
    return loaded, registrations
