"""The CUDA backend on CPU tensors: kernels compiled to PTX, launched by ptxrun from the plans that the GPU gets.

Inside `installed()` the phase ops `effkernels::<op>.cuda` take CPU tensors.
"""

import functools
import os
import pathlib
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from effkernels import _native
from effkernels.ops._layout import empty_map
from effkernels.ops.batch_norm.op import Reduce

CSRC = pathlib.Path(__file__).parents[2] / "csrc"
FOLDER = os.environ.get("EFFKERNELS_PTXRUN")
if FOLDER:
    sys.path.insert(0, FOLDER)
    import ptxrun


arch = "sm_80"
options: dict[str, Any] = {"race": True}  # of ptxrun's Module.run
results: list[Any] = []  # of every launch


def why_not() -> str | None:
    """Why nothing can be emulated here, or None."""
    if not FOLDER:
        return "EFFKERNELS_PTXRUN does not name the folder that holds ptxrun/"
    if _native.introspection is None:
        return "the introspection module was not built"
    if ptxrun.frontends.find_nvcc() is None:
        return "no nvcc"
    return None


@functools.cache
def compiled(kernel: str, arch: str) -> Any:
    """A module with this one instance of a kernel template, given by its C++ name."""
    headers = [path.relative_to(CSRC) for path in CSRC.glob("*/kernel.cuh")]
    includes = "".join(f'#include "{header}"\n' for header in headers)
    source = f"{includes}const void* instance() {{ return reinterpret_cast<const void*>(&{kernel}); }}\n"
    return ptxrun.Module(ptxrun.compile_cu(source, arch, flags=(f"-I{CSRC}", "--expt-relaxed-constexpr")))


def execute(plan: dict[str, Any], *tensors: Tensor | None) -> None:
    """Run a plan's launches; `tensors` are all that its parameters may point into."""
    given = [t for t in tensors if t is not None]
    for launch in plan.get("launches", [plan]):
        kernel, grid, block, shared = (launch[key] for key in ("kernel", "grid", "block", "shared_bytes"))
        params = unpack(launch["params"], given)
        result = compiled(kernel, arch).run(kernel, grid, block, [params], shared, **options)
        assert not result.warnings, result.warnings[:3]
        results.append(result)


def unpack(params: bytes, tensors: list[Tensor]) -> list[tuple[str, Any]]:
    """The struct as ptxrun takes it: the words that are a tensor's address become that tensor."""
    by_address = {t.data_ptr(): t for t in tensors if t.numel()}
    whole = len(params) // 8 * 8
    words = [("P", by_address[w]) if w in by_address else ("Q", w) for (w,) in struct.iter_unpack("Q", params[:whole])]
    return words + [("B", byte) for byte in params[whole:]]


def describe(x: Tensor) -> tuple[int, list[int], list[int]]:
    return x.data_ptr(), list(x.shape), list(x.stride())


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def transform(vectors: tuple[Tensor | None, ...], eps: float, act: int) -> tuple[list[int], float, int, int]:
    float32 = sum((t is not None and t.dtype == torch.float32) << i for i, t in enumerate(vectors))
    return [0 if t is None else t.data_ptr() for t in vectors], eps, float32, act


def is_channels_last(y: Tensor) -> bool:
    return torch._prims_common.suggest_memory_format(y) == torch.channels_last


def execute_reducing(make_plan: Any, sums: Tensor, *tensors: Tensor | None, **arguments: Any) -> None:
    """Run a plan that needs memory for partial sums, of which only the plan knows the size."""
    workspace = torch.empty(make_plan(**arguments)["workspace_floats"])
    plan = make_plan(**arguments, sums=sums.data_ptr(), workspace=workspace.data_ptr())
    execute(plan, sums, workspace, *tensors)


def empty_sums(x: Tensor, reduce: int) -> Tensor:
    n, c = x.shape[:2]
    return torch.empty({Reduce.NONE: (0,), Reduce.MEAN: (n, c), Reduce.STATISTICS: (2, c)}[Reduce(reduce)])


def dwconv(
    x: Tensor, weight: Tensor,
    mean1: Tensor | None, var1: Tensor | None, gamma1: Tensor | None, beta1: Tensor | None, eps1: float, act1: int,
    mean2: Tensor | None, var2: Tensor | None, gamma2: Tensor | None, beta2: Tensor | None, eps2: float, act2: int,
    stride: int, pad_top: int, pad_left: int, out_h: int, out_w: int, reduce: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, sums = empty_map(x, (*x.shape[:2], out_h, out_w)), empty_sums(x, reduce)
    prologue, epilogue = (mean1, var1, gamma1, beta1), (mean2, var2, gamma2, beta2)
    weight = weight.contiguous()
    execute_reducing(
        _native.introspection.dwconv_plan, sums, x, weight, y, *prologue, *epilogue,
        x=describe(x), y=describe(y), dtype=dtype_name(x), channels_last=is_channels_last(x), weight=weight.data_ptr(),
        prologue=transform(prologue, eps1, act1), epilogue=transform(epilogue, eps2, act2),
        kernel_size=weight.shape[2], stride=stride, pad_top=pad_top, pad_left=pad_left, reduce=reduce,
    )  # fmt: skip
    return y, sums


def map_pass(
    x: Tensor, norm: tuple[Tensor | None, ...], eps: float, act: int, gate: Tensor | None, reduce: int, stores: bool
) -> tuple[Tensor, Tensor]:
    y, sums = empty_map(x, x.shape), empty_sums(x, reduce)
    execute_reducing(
        _native.introspection.map_pass_plan, sums, x, y, gate, *norm,
        x=describe(x), y=describe(y) if stores else (0, *describe(x)[1:]), dtype=dtype_name(x),
        channels_last=is_channels_last(x), transform=transform(norm, eps, act),
        gate=0 if gate is None else gate.data_ptr(), reduce=reduce,
    )  # fmt: skip
    return y, sums


NO_NORM = (None, None, None, None)


def bn_statistics(x: Tensor) -> Tensor:
    return map_pass(x, NO_NORM, 0.0, 0, None, Reduce.STATISTICS, stores=False)[1]


def bn_apply(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, act: int, reduce: int
) -> tuple[Tensor, Tensor]:
    return map_pass(x, (mean, var, gamma, beta), eps, act, None, reduce, stores=True)


def spatial_mean(x: Tensor) -> Tensor:
    return map_pass(x, NO_NORM, 0.0, 0, None, Reduce.MEAN, stores=False)[1]


def channel_scale(x: Tensor, gate: Tensor) -> Tensor:
    return map_pass(x, NO_NORM, 0.0, 0, gate, Reduce.NONE, stores=True)[0]


def se_gate(
    pooled: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: int, gate: int
) -> Tensor:
    out = torch.empty_like(pooled)
    tensors = dict(pooled=pooled, gate=out, reduce_weight=w1, reduce_bias=b1, expand_weight=w2, expand_bias=b2)
    plan = _native.introspection.se_gate_plan(
        **{name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}, batch=pooled.shape[0],
        channels=pooled.shape[1], reduced=w1.shape[0], dtype=dtype_name(w1), activation=act, gate_activation=gate,
    )  # fmt: skip
    execute(plan, *tensors.values())
    return out


@contextmanager
def installed() -> Iterator[None]:
    library = torch.library.Library("effkernels", "IMPL")
    for function in (dwconv, bn_statistics, bn_apply, spatial_mean, se_gate, channel_scale):
        library.impl(f"{function.__name__}.cuda", function, "CPU")
    yield
    library._destroy()
