"""Compiles csrc/ with this machine's compilers: when pip installs the package, else at the first import.

Standard library only, since pip runs this file in an environment of its own, without torch. Three libraries are built:
`cpu` and `cuda`, against torch's stable ABI, and `introspection`, a pybind11 module. Their sources are found by name
(csrc/<op>/cpu.cpp and so on), so a new op changes nothing here.

The kernels, which take nearly all of the time, know nothing of torch: where pip installs the package and torch
together, they are compiled by pip (`build_without_torch`), and the first import adds what includes torch's headers.

A finished build is a folder named after the hash of its sources, under one folder per Python and kind of torch:
`build/<tag>/<hash>` in a checkout, else the user's cache. It appears by a rename, never half written. Objects are kept
beside the tags, in `work`.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

PACKAGE = pathlib.Path(__file__).resolve().parent
CHECKOUT = (PACKAGE.parent / "csrc").is_dir()
CSRC = PACKAGE.parent / "csrc" if CHECKOUT else PACKAGE / "csrc"
HOME = PACKAGE.parent / "build" if CHECKOUT else PACKAGE / "lib"
CACHE = (
    pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    / "effkernels"
    / hashlib.sha256(bytes(PACKAGE)).hexdigest()[:8]
)
SUFFIXES = (".h", ".cpp", ".cuh", ".cu")

MINIMUM_TORCH = (2, 10)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
INCLUDES = [f"-I{CSRC}", f"-I{CSRC / 'common'}"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Kernels may contract and vectorise, but keep NaN, infinities and the order of sums.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX2, *AVX512, "-mavx512bf16"]
# What these add to avx512 is products of bfloat16.
BFLOAT16_ISAS = {"avx512_bf16": AVX512_BF16, "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]}
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "--threads=2"]
# One per generation, which runs on all chips of that generation; the last known to nvcc as PTX too, for those to come.
CUDA_ARCHES = ["7.5", "8.0", "9.0", "10.0", "12.0"]


class Torch(NamedTuple):
    """A torch installation, known without importing it."""

    folder: pathlib.Path
    version: str
    cuda: str | None


class Build(NamedTuple):
    """A build's folder (None: nothing could be built), and for each library why it is missing (None: it is there)."""

    folder: pathlib.Path | None
    missing: dict[str, str | None]

    def library(self, name: str) -> pathlib.Path:
        assert self.folder is not None
        return self.folder / LIBRARIES[name]


LIBRARIES = {
    "cpu": "libeffkernels_cpu.so",
    "cuda": "libeffkernels_cuda.so",
    "introspection": "_introspection" + sysconfig.get_config_var("EXT_SUFFIX"),
}
FAILED = "does not compile"


def isas(kernel: pathlib.Path | None = None) -> dict[str, list[str]]:
    """The instruction sets that CPU kernels are compiled for, and the compiler flags of each.

    One `kernel` is compiled for those that add products of bfloat16 only if it has products.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"baseline": []}
    sets = {"baseline": [], "avx2": AVX2, "avx512": AVX2 + AVX512}
    if kernel is None or 'matmul.h"' in kernel.read_text():
        sets |= BFLOAT16_ISAS
    return sets


def find_torch() -> Torch | None:
    """The torch of the environment that this is installed into, also from within pip's isolated build environment."""
    folders = [pathlib.Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")]
    config = pathlib.Path(sys.prefix, "pyvenv.cfg")
    if config.exists() and re.search(r"include-system-site-packages\s*=\s*true", config.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [pathlib.Path(sysconfig.get_paths(vars=base)[key]) for key in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        folders.insert(0, pathlib.Path(spec.origin).parents[1])
    for folder in folders:
        file = folder / "torch" / "version.py"
        if file.exists():
            values = dict(re.findall(r"^(\w+)(?:: [^=]+)? = '([^']+)'", file.read_text(), re.MULTILINE))
            return Torch(file.parent, values["__version__"], values.get("cuda"))
    return None


def find_cxx() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for place in places if (path := shutil.which(place))), None)


def source_hash() -> str:
    """The key of a build: a hash of csrc/ and of this file. Takes a few milliseconds."""
    return _sha256(json.dumps([_source_hashes(), _sha256(pathlib.Path(__file__).read_bytes())]).encode())[:16]


def _source_hashes() -> dict[str, str]:
    paths = sorted(path for path in CSRC.rglob("*.*") if path.suffix in SUFFIXES)
    return {path.relative_to(CSRC).as_posix(): _sha256(path.read_bytes()) for path in paths}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def ensure(torch: Torch) -> Build:
    """The build of the present sources; compiled first where there is none."""
    tag, key = _tag(torch), source_hash()
    for base in (HOME, CACHE):
        found = _read(base / tag / key)
        if found and not _worth_retrying(found, torch):
            return found
    try:
        return build(torch, unless_done=True)
    except (OSError, subprocess.SubprocessError) as error:
        return _nothing(f"could not be built: {error}")


def build(torch: Torch, *, unless_done: bool = False) -> Build:
    """Compile what has changed."""
    if tuple(map(int, torch.version.split(".")[:2])) < MINIMUM_TORCH:
        return _nothing(f"needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, found {torch.version}")
    tools = _tools()
    if isinstance(tools, str):
        return _nothing(tools)
    home = _writable_home()
    with _lock(home):
        key = source_hash()
        if unless_done and (found := _read(home / _tag(torch) / key)) and not _worth_retrying(found, torch):
            return found
        return _build(torch, tools, home, key)


def build_without_torch() -> str | None:
    """Compile what needs no torch: the kernels and the introspection module. Returns why nothing could be, or None.

    A kernel that does not compile is left to the first import, which says so.
    """
    tools = _tools()
    if isinstance(tools, str):
        return tools
    home = _writable_home()
    with _lock(home):
        _run_ninja(None, tools, home / "work", [name for name in LIBRARIES if _obstacle(name, None) is None])
    return None


class Tools(NamedTuple):
    cxx: str
    ninja: str


def _tools() -> Tools | str:
    """What every build needs, or what is missing of it."""
    cxx, ninja = find_cxx(), _find_ninja()
    if os.name != "posix":
        return "is built on Linux and macOS only"
    if cxx is None:
        return "no C++ compiler: install g++ (Debian, Ubuntu: apt install g++) or clang++, or set CXX"
    if ninja is None:
        return "ninja is not installed: pip install ninja"
    return Tools(cxx, ninja)


def _writable_home() -> pathlib.Path:
    return HOME if CHECKOUT and os.access(HOME.parent, os.W_OK) else CACHE


def _run_ninja(torch: Torch | None, tools: Tools, work: pathlib.Path, wanted: list[str]) -> str:
    """Compile the `wanted` libraries, without `torch` only their kernels. Returns the log."""
    work.mkdir(exist_ok=True)
    _discard_misdated(work)
    _write_ninja(torch, tools.cxx, work, wanted)
    jobs = os.environ.get("MAX_JOBS")
    command = [tools.ninja, "-C", str(work), "-k", "0", *(["-j", jobs] if jobs else [])]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace").stdout


def _build(torch: Torch, tools: Tools, home: pathlib.Path, key: str) -> Build:
    started = time.time()
    print(f"effkernels: compiling its kernels in {home}", file=sys.stderr, flush=True)
    work, base = home / "work", home / _tag(torch)
    missing = {library: _obstacle(library, torch) for library in LIBRARIES}
    wanted = [name for name, reason in missing.items() if reason is None]
    log = _run_ninja(torch, tools, work, wanted)

    folder, partial = base / key, base / f"{key}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in wanted:
        # A library whose objects failed is still there from the build before: ask ninja, not the file system.
        query = subprocess.run([tools.ninja, "-C", str(work), "-n", LIBRARIES[name]], capture_output=True, text=True)
        if "no work to do" in query.stdout:
            shutil.copy2(work / LIBRARIES[name], partial)
        else:
            missing[name] = f"{FAILED}, see {folder / 'build.log'}"
    (partial / "build.log").write_text(log)
    (partial / "build.json").write_text(json.dumps(missing, indent=1))
    for old in base.iterdir():
        if old != partial and old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
    partial.rename(folder)
    print(f"effkernels: compiled in {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    return Build(folder, missing)


def _tag(torch: Torch) -> str:
    # Thanks to the stable ABI, of torch only the CUDA generation matters.
    flavour = "cu" + torch.cuda.split(".")[0] if torch.cuda else "cpu"
    return f"{sys.implementation.cache_tag}-{platform.machine()}-{flavour}"


def _read(folder: pathlib.Path) -> Build | None:
    try:
        return Build(folder, json.loads((folder / "build.json").read_text()))
    except OSError:
        return None


def _worth_retrying(found: Build, torch: Torch) -> bool:
    """Whether a library was left out for a reason that holds no longer."""
    left_out = [name for name, reason in found.missing.items() if reason and not reason.startswith(FAILED)]
    return any(_obstacle(name, torch) is None for name in left_out)


def _nothing(reason: str) -> Build:
    return Build(None, dict.fromkeys(LIBRARIES, reason))


def _obstacle(library: str, torch: Torch | None) -> str | None:
    """Why `library` need not be tried."""
    if library == "cuda":
        return _why_no_cuda(torch)
    return _why_no_introspection() if library == "introspection" else None


def _why_no_cuda(torch: Torch | None) -> str | None:
    if torch and torch.cuda is None:
        return f"torch {torch.version} is not a CUDA build"
    nvcc = find_nvcc()
    if nvcc is None:
        return f"no nvcc: install the CUDA toolkit{f' {torch.cuda}' if torch else ''}, or set CUDA_HOME"
    release = nvcc_release(nvcc)
    if torch and torch.cuda and release.split(".")[0] != torch.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {release}, but torch {torch.version} of CUDA {torch.cuda}"
    try:
        cuda_arches(nvcc)
    except ValueError as error:
        return str(error)
    return None


def _why_no_introspection() -> str | None:
    if not importlib.util.find_spec("pybind11"):
        return "pybind11 is not installed: pip install pybind11"
    if not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "no Python.h: install Python's development files (Debian, Ubuntu: apt install python3-dev)"
    return None


def nvcc_release(nvcc: str) -> str:
    match = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    assert match, f"{nvcc} --version names no release"
    return match[1]


def cuda_arches(nvcc: str) -> list[str]:
    """The architectures to compile for: those of TORCH_CUDA_ARCH_LIST, or those of `CUDA_ARCHES` that nvcc knows."""
    requested = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if requested == [""]:
        known = _output([nvcc, "--list-gpu-arch"]).split()
        arches = [arch for arch in CUDA_ARCHES if f"compute_{_digits(arch)}" in known]
        if not arches:
            raise ValueError(f"{nvcc} compiles for none of {', '.join(CUDA_ARCHES)}; set TORCH_CUDA_ARCH_LIST")
        return [*arches[:-1], f"{arches[-1]}+PTX"]
    for arch in requested:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {arch!r}; accepted are entries like 8.0, 9.0a and 12.0+PTX")
    return requested


def _digits(arch: str) -> str:
    return arch.removesuffix("+PTX").replace(".", "")


def _gencode(arch: str) -> list[str]:
    digits = _digits(arch)
    codes = [f"sm_{digits}", *([f"compute_{digits}"] if arch.endswith("+PTX") else [])]
    return [f"-gencode=arch=compute_{digits},code={code}" for code in codes]


def _write_ninja(torch: Torch | None, cxx: str, work: pathlib.Path, wanted: list[str]) -> None:
    cxx_flags = [*CXX_FLAGS, *INCLUDES]
    info: dict[str, Any] = {
        "python": platform.python_version(),
        "compiler": _output([cxx, "--version"]).splitlines()[0],
        "cxx_flags": [*CXX_FLAGS, *KERNEL_FLAGS],
        "cpu_isas": isas(),
        "nvcc": None,
        "nvcc_flags": [],
        "cuda_arches": [],
    }
    lines = [
        *("rule cxx", f"  command = {shlex.quote(cxx)} $flags -MMD -MF $out.d -c $in -o $out"),
        *("  depfile = $out.d", "  deps = gcc"),
        *("rule link", "  command = $linker -shared $in -o $out $flags"),
    ]

    def compile(rule: str, source: pathlib.Path, flags: list[str], variant: str = "") -> str:
        target = f"{source.relative_to(CSRC)}{variant}.o"
        lines.extend([f"build {target}: {rule} {_escaped(source)}", f"  flags = {_joined(flags)}"])
        return target

    def link(name: str, objects: list[str], linker: list[str], flags: list[str]) -> None:
        lines.extend([f"build {LIBRARIES[name]}: link {' '.join(objects)}"])
        lines.extend([f"  linker = {_joined(linker)}", f"  flags = {_joined(flags)}", f"default {LIBRARIES[name]}"])

    def link_with_torch(name: str, kernels: list[str], linker: list[str], define: list[str], needs: list[str]) -> None:
        if torch is None:
            lines.append(f"default {' '.join(kernels)}")
            return
        flags = [*cxx_flags, *STABLE_ABI, *define, "-isystem", str(torch.folder / "include")]
        registrations = [compile("cxx", source, flags) for source in sources(f"*/{name}.cpp")]
        link(name, registrations + kernels, linker, [f"-L{torch.folder / 'lib'}", *needs])

    if "cpu" in wanted:
        kernels = [
            compile("cxx", source, [*cxx_flags, *KERNEL_FLAGS, *flags, f"-DEFFK_ISA={isa}"], f".{isa}")
            for source in sources("*/cpu_kernel.cpp")
            for isa, flags in isas(source).items()
        ]
        link_with_torch("cpu", kernels, [cxx], [], ["-ltorch_cpu"])
    if "cuda" in wanted:
        nvcc = find_nvcc()
        assert nvcc is not None
        arches = cuda_arches(nvcc)
        flags = [*NVCC_FLAGS, *(flag for arch in arches for flag in _gencode(arch))]
        host = ["-ccbin", cxx, "-Xcompiler=-fPIC,-fvisibility=hidden"]
        info |= {"nvcc": f"{nvcc_release(nvcc)} ({nvcc})", "nvcc_flags": flags, "cuda_arches": arches}
        lines += ["rule nvcc", f"  command = {shlex.quote(nvcc)} $flags -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        kernels = [compile("nvcc", source, [*flags, *host, *INCLUDES]) for source in sources("*/cuda_kernel.cu")]
        link_with_torch("cuda", kernels, [nvcc, "-ccbin", cxx], ["-DUSE_CUDA"], ["-ltorch_cpu", "-ltorch_cuda"])
    if "introspection" in wanted:
        import pybind11

        header, content = work / "build_info.h", f'#define EFFK_BUILD_INFO R"json({json.dumps(info)})json"\n'
        if not header.exists() or header.read_text() != content:
            header.write_text(content)
        # Through a link, because pip's build environment and the first import find it in different places.
        headers = work / f"pybind11-{pybind11.__version__}"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include())
        includes = [f"-I{work}", "-isystem", str(headers), "-isystem", sysconfig.get_paths()["include"]]
        objects = [
            compile("cxx", source, [*cxx_flags, *includes])
            for source in [*sources("introspection/*.cpp"), *sources("*/plan_bind.cpp")]
        ]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        link("introspection", objects, [cxx], undefined)
    (work / "build.ninja").write_text("\n".join(lines) + "\n")


def sources(pattern: str) -> list[pathlib.Path]:
    return sorted(CSRC.glob(pattern))


def _discard_misdated(work: pathlib.Path) -> None:
    """Start afresh where a source changed and yet got no later date, as after `mv backup.h kernel.h`.

    Ninja goes by dates, and would miss it.
    """
    file = work / "sources.json"
    now = {name: (digest, (CSRC / name).stat().st_mtime) for name, digest in _source_hashes().items()}
    then = json.loads(file.read_text()) if file.exists() else {}
    if any(now[name][0] != digest and now[name][1] <= date for name, (digest, date) in then.items() if name in now):
        shutil.rmtree(work)
        work.mkdir()
    file.write_text(json.dumps(now))


@contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_ninja() -> str | None:
    folders = [os.environ.get("PATH", "")]
    if importlib.util.find_spec("ninja"):
        import ninja

        folders.insert(0, ninja.BIN_DIR)
    return shutil.which("ninja", path=os.pathsep.join(folders))


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _joined(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _escaped(path: pathlib.Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))
