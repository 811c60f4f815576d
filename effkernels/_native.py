"""The compiled libraries: built where they are stale or missing, loaded, and if not there, why not."""

import ctypes
import importlib.machinery
import importlib.util
import pathlib
import types
import warnings

import torch

from effkernels import _build

BUILD = _build.ensure(_build.Torch(pathlib.Path(torch.__file__).parent, torch.__version__, torch.version.cuda))

# Of each kernel backend: None if it can be used, else the reason as a phrase. Plain data, for torch.compile to read.
MISSING: dict[str, str | None] = {
    "cpp": BUILD.missing["cpu"],
    "cuda": BUILD.missing["cuda"],
    "triton": None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton",
}


def _load_introspection() -> types.ModuleType | None:
    if BUILD.missing["introspection"]:
        return None
    loader = importlib.machinery.ExtensionFileLoader("effkernels._introspection", str(BUILD.library("introspection")))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


for _backend, _library in (("cpp", "cpu"), ("cuda", "cuda")):
    if MISSING[_backend] is None:
        try:
            torch.ops.load_library(BUILD.library(_library))
        except OSError as error:
            MISSING[_backend] = f"does not load: {error}"
# The library of the CUDA launchers, for what they are told beside tensors (ops/_tiles.py); None where it is missing.
launchers = None if MISSING["cuda"] else ctypes.CDLL(str(BUILD.library("cuda")))
# The pybind11 module of csrc/introspection; None where it could not be built.
introspection = None
try:
    introspection = _load_introspection()
except ImportError as error:
    warnings.warn(f"effkernels runs without its introspection module: {error}", stacklevel=2)
# The instruction set of the C++ kernels that run here.
CPU_ISA: str = introspection.cpu_isa() if introspection else "unknown"

if MISSING["cpp"]:
    warnings.warn(f"effkernels runs without its C++ kernels: {MISSING['cpp']}", stacklevel=2)
