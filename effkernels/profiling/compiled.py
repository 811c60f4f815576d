"""What the compilers make of every GPU kernel, measured with no GPU: `python -m effkernels.profiling.compiled`.

Each instance that the package launches is compiled to machine code for each architecture: of the CUDA kernels those in
csrc/*/cuda_kernel.cu, of the Triton kernels those that `NETWORKS` launch in training and in inference, in every dtype
and layout. The table in docs/ is brought up to date; what has the sources of its row is not compiled again.
"""

import argparse
import csv
import functools
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from effkernels import _build, backends
from effkernels.models import create_model
from effkernels.models.configs import CONFIGS
from effkernels.nn import MBConv
from effkernels.profiling.machine_code import CHIPS, kernels, occupancy
from effkernels.profiling.meta import as_on_gpu

TABLE = _build.PACKAGE.parent / "docs" / "compiled_kernels.csv"
SUMMARY = TABLE.with_suffix(".md")
BATCH = 8


def _b0() -> tuple[nn.Module, tuple[int, ...]]:
    size = CONFIGS["efficientnet_b0"].resolution
    return create_model("efficientnet_b0"), (BATCH, 3, size, size)


def _blocks_with_wide_windows() -> tuple[nn.Module, tuple[int, ...]]:
    blocks = [MBConv(32, 32, kernel_size=7, stride=stride, expand_ratio=6, se_ratio=0.25) for stride in (1, 2)]
    return nn.Sequential(*blocks), (BATCH, 32, 56, 56)


# A network and the shape of its input.
NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "EfficientNet-B0": _b0,
    "blocks with 7x7 windows": _blocks_with_wide_windows,
}


class Row(NamedTuple):
    """One kernel instance on one architecture; `machine_code.Kernel` tells of its measures."""

    arch: str
    backend: str
    kernel: str  # Triton's function; the folder of a CUDA kernel
    instance: str
    threads: int
    registers: int
    local: int
    stack: int
    shared: int  # of a CUDA kernel without what its plans add
    occupancy: int  # percent of the warps that a multiprocessor can hold
    load: int
    store: int
    matrix: str
    compiler: str
    source: str  # hash of what the compiler read


class Unit(NamedTuple):
    """What one run of a compiler makes: the rows with these values."""

    arch: str
    backend: str
    kernel: str
    instance: str | None  # None: several, named by the compiler
    compiler: str
    source: str
    compile: Callable[[], tuple[bytes, int]]  # machine code, and the bytes of shared memory that a launch adds

    @property
    def key(self) -> tuple[str | None, ...]:
        return self.arch, self.backend, self.kernel, self.instance


def key(row: Row) -> tuple[str | None, ...]:
    """Of the unit that makes it."""
    return row.arch, row.backend, row.kernel, None if row.backend == "cuda" else row.instance


def units() -> list[Unit]:
    return [unit for arch in CHIPS for unit in (*cuda_units(arch), *triton_units(arch))]


def cuda_units(arch: str) -> Iterator[Unit]:
    nvcc = _build.find_nvcc()
    compiler = f"nvcc {_nvcc_release(nvcc)}" if nvcc else "none"
    for source in _build.sources("*/cuda_kernel.cu"):
        digest = _hash(*_build.NVCC_FLAGS, *(path.read_text() for path in _with_headers(source)))
        compile = functools.partial(_nvcc, nvcc, arch, source)
        yield Unit(arch, "cuda", source.parent.name, None, compiler, digest, compile)


_nvcc_release = functools.cache(_build.nvcc_release)


def _nvcc(nvcc: str | None, arch: str, source: pathlib.Path) -> tuple[bytes, int]:
    if nvcc is None:
        raise RuntimeError(f"there is no nvcc to compile {source}")
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        command = [nvcc, *_build.NVCC_FLAGS, *_build.INCLUDES, f"-arch={arch}", "-cubin", str(source), "-o", str(cubin)]
        subprocess.run(command, check=True)
        return cubin.read_bytes(), 0


def _with_headers(source: pathlib.Path) -> list[pathlib.Path]:
    """`source` and the files of csrc/ that it includes, at any depth."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            folders = (path.parent, _build.CSRC, _build.CSRC / "common")
            header = next(file for folder in folders if (file := (folder / name).resolve()).exists())
            if header not in found:
                found.append(header)
    return sorted(found)


def triton_units(arch: str) -> Iterator[Unit]:
    for (kernel, instance), launch in triton_launches(arch).items():
        digest, compile = _hash(*_with_callees(launch["fn"])), functools.partial(_triton, arch, launch)
        yield Unit(arch, "triton", kernel, instance, f"triton {triton.__version__}", digest, compile)


def _target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _triton(arch: str, launch: dict[str, Any]) -> tuple[bytes, int]:
    source = ASTSource(launch["fn"], launch["signature"], launch["constants"], launch["attrs"])
    compiled = triton.compile(source, target=_target(arch), options=launch["options"])
    return compiled.asm["cubin"], compiled.metadata.shared


@functools.cache
def _with_callees(kernel: JITFunction[Any]) -> tuple[str, ...]:
    """The sources of `kernel` and of the device functions that it calls, and the constants that they name."""
    texts, functions = [], [kernel]
    for function in functions:
        texts.append(function.src)
        names = dict.fromkeys(re.findall(r"\b[A-Za-z_]\w*", function.src))
        for value in (function.__globals__.get(name) for name in names):
            if isinstance(value, triton.language.constexpr):
                texts.append(repr(value.value))
            elif isinstance(value, JITFunction) and value not in functions:
                functions.append(value)
    return tuple(texts)


@functools.cache
def triton_launches(arch: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Of each kernel and instance that `NETWORKS` launch, what Triton compiles."""
    launches: dict[tuple[str, str], dict[str, Any]] = {}

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        launch = {name: compile[name] for name in ("signature", "constants")}
        launch |= {"fn": fn.jit_function, "attrs": compile["configs"][0]}
        launch["options"] = {name: options[name] for name in ("num_warps", "maxnreg")}
        launches.setdefault((fn.name, _instance(launch)), launch)
        return True  # neither compile nor launch

    runs = itertools.product(
        NETWORKS.values(), backends.DTYPES["triton"], (torch.contiguous_format, torch.channels_last), (False, True)
    )
    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", record), _triton_on_meta(arch):
        for network, dtype, layout, training in runs:
            with torch.device("meta"), torch.set_grad_enabled(training):
                model, shape = network()
                model.to(dtype).to(memory_format=layout).train(training)
                y = model(torch.empty(shape, dtype=dtype).to(memory_format=layout))
            if training:
                y.sum().backward()
    return launches


LETTERS = {"*fp32": "f", "*fp16": "h", "*bf16": "b", "i32": "i", "i64": "l", "fp32": "s"}


def _instance(launch: dict[str, Any]) -> str:
    """The types of a kernel's arguments, a letter each, its constants, its warps, and its registers if it limits them.

    f, h, b: a pointer to float32, float16, bfloat16; i, l: an integer; s: a float; in capitals where Triton may assume
    a multiple of 16; - where there is no argument, 1 where it is always 1.
    """
    types, constants = "", []
    for i, (name, kind) in enumerate(launch["signature"].items()):
        value = launch["constants"].get((i,))
        if kind != "constexpr":
            types += LETTERS[kind].upper() if launch["attrs"].get((i,)) else LETTERS[kind]
        elif name.isupper():
            constants.append(f"{name}={value}")
        else:
            types += "-" if value is None else str(value)
    options = [f"{name}={value}" for name, value in launch["options"].items() if value]
    return " ".join([types, *constants, *options])


class _NoGPU:
    """As much of a driver as Triton asks before it compiles."""

    def __init__(self, arch: str) -> None:
        self._target = _target(arch)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Implementations(TorchDispatchMode):
    """Runs what implements our ops on meta tensors, where the dispatcher would run their fake kernels."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "effkernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            # On meta tensors a convolution forgets the layout.
            result = result.contiguous(memory_format=torch._prims_common.suggest_memory_format(args[0]))
        return result


@contextmanager
def _triton_on_meta(arch: str) -> Iterator[None]:
    """Modules and ops call Triton's kernels with meta tensors, as on a GPU of this architecture."""
    driver = triton.runtime.driver._active
    triton.runtime.driver.set_active(_NoGPU(arch))
    try:
        with as_on_gpu(), backends.use_backend("triton"), _Implementations():
            yield
    finally:
        triton.runtime.driver._active = driver


def rows(unit: Unit) -> list[Row]:
    code, launch_shared = unit.compile()
    found = []
    for k in kernels(code, unit.arch):
        shared = k.shared + launch_shared
        found.append(
            Row(
                arch=unit.arch,
                backend=unit.backend,
                kernel=unit.kernel,
                instance=unit.instance or _demangled(k.name),
                threads=k.threads,
                registers=k.registers,
                local=k.local,
                stack=k.stack,
                shared=shared,
                occupancy=occupancy(CHIPS[unit.arch], k.threads, k.registers, shared),
                load=k.load,
                store=k.store,
                matrix=k.matrix,
                compiler=unit.compiler,
                source=unit.source,
            )
        )
    return found


def _demangled(name: str) -> str:
    """`dwconv::nchw<float, 3, 1>`"""
    plain = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    return re.sub(r"^void |\(.*|effk::|\n", "", plain)


def read() -> list[Row]:
    with TABLE.open(newline="") as file:
        kinds = inspect.get_annotations(Row, eval_str=True).values()
        return [Row(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in list(csv.reader(file))[1:]]


def write(table: list[Row]) -> None:
    arches = [*CHIPS]
    ordered: list[Row] = sorted(table, key=lambda row: (arches.index(row.arch), row))
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(ordered)
    SUMMARY.write_text(summary(table))


def out_of_date(table: list[Row]) -> list[str]:
    """What is launched and not in `table` with its present sources, and what is there and launched no longer."""
    wanted = {(unit.key, unit.source) for unit in units()}
    there = {(key(row), row.source) for row in table}
    return sorted(" ".join(filter(None, key)) for key, _ in wanted ^ there)


SUMMARY_TEXT = """# The GPU kernels as compiled

What the compilers make of the {count} kernel instances: of every Triton instance that {networks}
launch in training and in inference, in float32, float16 and bfloat16, NCHW and channels_last, and of every instance of
the CUDA kernels.
Nothing here was run: `python -m effkernels.profiling.compiled` compiles them for each architecture and reads the
machine code, on any machine with nvcc and Triton. {local} of them use local memory: no register is spilled.

A cell says the most registers of a thread and the least occupancy: of the warps that a multiprocessor can hold, those
that registers, threads and shared memory allow (of a CUDA kernel without the shared memory that its launch plan adds).
Load and store are the widest accesses to global memory, in bits. Each instance has a row in
[{table}]({table}).

| kernel | instances | load, store | matrix instructions |{arches}
|---|---|---|---|{rule}
{rows}
"""


def summary(table: list[Row]) -> str:
    lines = []
    names = {
        row: f"{row.backend}: {row.kernel if row.backend == 'triton' else row.instance.split('<')[0]}" for row in table
    }
    for name in sorted({*names.values()}):
        group = [row for row in table if names[row] == name]
        cells = [
            name,
            str(len({row.instance for row in group})),
            f"{max(row.load for row in group)}, {max(row.store for row in group)}",
            ", ".join(sorted({row.matrix for row in group} - {""})) or "no",
        ]
        for arch in CHIPS:
            here = [row for row in group if row.arch == arch]
            cells.append(
                f"{max(row.registers for row in here)}, {min(row.occupancy for row in here)} %" if here else ""
            )
        lines.append(f"| {' | '.join(cells)} |")
    return SUMMARY_TEXT.format(
        count=len({row[1:4] for row in table}),
        networks=" and ".join(NETWORKS),
        local=sum(row.local > 0 or row.stack > 0 for row in table) or "None",
        table=TABLE.name,
        arches="".join(f" {arch} |" for arch in CHIPS),
        rule="---|" * len(CHIPS),
        rows="\n".join(lines),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m effkernels.profiling.compiled", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the table is out of date")
    parser.add_argument("--again", nargs="+", default=[], choices=CHIPS, help="architectures to compile in any case")
    options = parser.parse_args()
    table = read() if TABLE.exists() else []
    by_unit: dict[Any, list[Row]] = {}
    for row in table:
        by_unit.setdefault(key(row), []).append(row)
    kept: list[Row] = []
    stale: list[Unit] = []
    for unit in units():
        known = by_unit.get(unit.key)
        if known and known[0].source == unit.source and unit.arch not in options.again:
            kept += known
        else:
            stale.append(unit)
    compiled: list[Row] = []
    for done, found in enumerate(_compile(stale), 1):
        compiled += found
        if not options.check:
            write(kept + compiled)  # a run that is broken off is not lost
        print(f"\rcompiled {done} of {len(stale)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    if not options.check:
        write(kept + compiled)
    problems = [f"uses local memory: {row}" for row in compiled if row.local or row.stack]
    if options.check:
        problems += _differences({*table}, {*kept, *compiled})
    print("\n".join(problems) or f"{len(kept)} rows as they were, {len(compiled)} compiled")
    sys.exit(bool(problems))


def _differences(table: set[Row], now: set[Row]) -> list[str]:
    """Another version of a compiler than the table's may give other figures."""
    versions = {row.compiler for row in table}
    different = {row for row in now - table if row.compiler in versions}
    gone = table - now if versions <= {row.compiler for row in now} else set()
    return [f"not in the table: {row}" for row in sorted(different)] + [f"only in it: {row}" for row in sorted(gone)]


_stale: list[Unit] = []


def _compile(stale: list[Unit]) -> Iterator[list[Row]]:
    """The rows of each unit, made by as many processes as MAX_JOBS says, by default one for each core."""
    global _stale
    _stale = stale  # for processes that fork: device functions cannot be sent to them
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_rows_of_stale, range(len(stale)))


def _rows_of_stale(index: int) -> list[Row]:
    return rows(_stale[index])


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
