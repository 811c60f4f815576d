"""The builder, on a small source tree of its own; and what it made of the real one."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import torch

from effkernels import _build as installed
from effkernels import _native

CPU = installed.Torch(pathlib.Path(torch.__file__).parent, "2.10.0+cpu", None)
CUDA = CPU._replace(version="2.10.0", cuda="13.0")

needs_compiler = pytest.mark.skipif(installed.find_cxx() is None, reason="needs a C++ compiler")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A checkout with one tiny op, and its builder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    for file, text in {
        "common/number.h": "#define NUMBER 1\n",
        "op/cpu.cpp": """
            #include "common/number.h"
            extern "C" __attribute__((visibility("default"))) int number() { return NUMBER; }
        """,
        "op/cpu_kernel.cpp": "namespace EFFK_ISA { int kernel() { return 1; } }\n",
        "introspection/module.cpp": '#include "build_info.h"\nconst char* info = EFFK_BUILD_INFO;\n',
    }.items():
        path = tmp_path / "tree" / "csrc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package = tmp_path / "tree" / "effkernels"
    package.mkdir()
    shutil.copy(installed.__file__, package)
    return load(package / "_build.py")


def load(file: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("builder_under_test", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(build: installed.Build) -> list[str]:
    """The files that the last build compiled, without the instruction sets."""
    commands = [line for line in (build.folder / "build.log").read_text().splitlines() if " -c " in line]
    return sorted({pathlib.Path(line.split(" -c ")[1].split()[0]).name for line in commands})


def fake(folder: pathlib.Path, name: str, output: str) -> str:
    """A program that prints `output`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_a_build_is_found_again(tree):
    first = tree.ensure(CPU)
    assert first.missing == {"cpu": None, "cuda": "torch 2.10.0+cpu is not a CUDA build", "introspection": None}
    assert compiled(first) == ["cpu.cpp", "cpu_kernel.cpp", "module.cpp"]
    made = first.library("cpu").stat().st_mtime_ns
    assert tree.ensure(CPU)[:2] == first[:2]
    assert first.library("cpu").stat().st_mtime_ns == made


@needs_compiler
def test_an_edit_recompiles_what_it_touches(tree):
    first = tree.ensure(CPU)
    (tree.CSRC / "op" / "cpu_kernel.cpp").write_text("namespace EFFK_ISA { int kernel() { return 2; } }\n")
    second = tree.ensure(CPU)
    assert compiled(second) == ["cpu_kernel.cpp"]
    assert not first.folder.exists()
    (tree.CSRC / "common" / "number.h").write_text("#define NUMBER 2\n")
    assert compiled(tree.ensure(CPU)) == ["cpu.cpp"]


@needs_compiler
def test_an_older_file_put_back_is_compiled(tree):
    header = tree.CSRC / "common" / "number.h"
    backup = shutil.copy2(header, header.with_suffix(".bak"))
    header.write_text("#define NUMBER 2\n")
    tree.ensure(CPU)
    os.replace(backup, header)
    assert number(tree.ensure(CPU)) == 1


@needs_compiler
def test_kernels_compiled_without_torch_are_not_compiled_again(tree, monkeypatch):
    monkeypatch.setattr(tree, "find_nvcc", lambda: None)
    assert tree.build_without_torch() is None
    assert compiled(tree.ensure(CPU)) == ["cpu.cpp"]


@needs_compiler
def test_a_new_op_needs_no_other_change(tree):
    tree.ensure(CPU)
    (tree.CSRC / "another").mkdir()
    (tree.CSRC / "another" / "cpu.cpp").write_text("int another() { return 1; }\n")
    assert compiled(tree.ensure(CPU)) == ["cpu.cpp"]


@needs_compiler
def test_a_library_that_does_not_compile_is_missing_and_the_others_are_not(tree):
    tree.ensure(CPU)
    (tree.CSRC / "op" / "cpu.cpp").write_text("not C++\n")
    build = tree.ensure(CPU)
    assert build.missing["cpu"] == f"does not compile, see {build.folder / 'build.log'}"
    assert build.missing["introspection"] is None
    assert not build.library("cpu").exists()
    log = (build.folder / "build.log").stat().st_mtime_ns
    tree.ensure(CPU)
    assert (build.folder / "build.log").stat().st_mtime_ns == log, "the same sources were compiled again"


@needs_compiler
def test_processes_that_start_together_build_once(tree):
    code = (
        f"import importlib.util, pathlib; s = importlib.util.spec_from_file_location('b', {tree.__file__!r});"
        "b = importlib.util.module_from_spec(s); s.loader.exec_module(b);"
        f"print(b.ensure(b.Torch(pathlib.Path({str(CPU.folder)!r}), '2.10.0', None)).missing['cpu'])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [process.communicate() for process in processes]
    assert [out for out, _ in outputs] == ["None\n"] * 4
    assert sum("compiling" in err for _, err in outputs) == 1


@needs_compiler
def test_a_tree_that_cannot_be_written_is_built_in_the_cache(tree, monkeypatch, tmp_path):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tree.CSRC.parent and access(path, mode))
    build = tree.ensure(CPU)
    assert build.missing["cpu"] is None
    assert build.folder.is_relative_to(tmp_path / "cache")
    assert tree.ensure(CPU).folder == build.folder


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_reason(tree, monkeypatch):
    tree.HOME.write_text("a file where the build folder should be")
    assert tree.ensure(CPU).missing["cpu"].startswith("could not be built: ")


def test_no_compiler(tree, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build = tree.ensure(CPU)
    assert build.folder is None
    assert "install g++" in build.missing["cpu"]
    assert not tree.HOME.exists()


def test_old_torch(tree):
    assert tree.ensure(CPU._replace(version="2.9.1")).missing["cpu"] == "needs torch >= 2.10, found 2.9.1"


def test_no_nvcc(tree, monkeypatch):
    monkeypatch.setattr(tree, "find_nvcc", lambda: None)
    assert tree._why_no_cuda(CUDA) == "no nvcc: install the CUDA toolkit 13.0, or set CUDA_HOME"


def test_nvcc_of_another_cuda(tree, monkeypatch, tmp_path):
    nvcc = fake(tmp_path / "cuda12" / "bin", "nvcc", "Cuda compilation tools, release 12.8, V12.8.93")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda12"))
    assert tree._why_no_cuda(CUDA) == f"{nvcc} is of CUDA 12.8, but torch 2.10.0 of CUDA 13.0"


@needs_compiler
def test_a_reason_that_holds_no_longer_is_noticed(tree, monkeypatch):
    monkeypatch.setattr(tree, "_why_no_introspection", lambda: "no Python.h")
    first = tree.ensure(CPU)
    assert first.missing["introspection"] == "no Python.h"
    assert compiled(first) == ["cpu.cpp", "cpu_kernel.cpp"]
    monkeypatch.setattr(tree, "_why_no_introspection", lambda: None)
    second = tree.ensure(CPU)
    assert second.missing["introspection"] is None
    assert compiled(second) == ["module.cpp"]


def test_arch_list(tree, monkeypatch, tmp_path):
    nvcc = fake(tmp_path, "nvcc", "compute_75 compute_80 compute_90")
    assert tree.cuda_arches(nvcc) == ["7.5", "8.0", "9.0+PTX"], "those of the default list that this nvcc knows"
    with pytest.raises(ValueError, match=r"compiles for none of 7\.5, .*set TORCH_CUDA_ARCH_LIST"):
        tree.cuda_arches(fake(tmp_path, "old_nvcc", "compute_50"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0; 9.0a+PTX")
    assert tree.cuda_arches(nvcc) == ["8.0", "9.0a+PTX"]
    assert tree._gencode("9.0a+PTX") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST has 'Hopper'; accepted are entries like 8\.0"):
        tree.cuda_arches(nvcc)


def test_other_machines_get_the_baseline(tree, monkeypatch):
    monkeypatch.setattr(tree.platform, "machine", lambda: "aarch64")
    assert tree.isas() == {"baseline": []}


@pytest.mark.parametrize(
    ("text", "version", "cuda"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", "2.13.0+cpu", None),
        ("__version__ = '2.14.1'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "2.14.1", "13.0"),
        ("__version__ = '2.11.0+rocm7'\ncuda: str | None = None\nhip: str | None = '7.0'\n", "2.11.0+rocm7", None),
    ],
)
def test_torch_is_found_without_an_import(tree, monkeypatch, tmp_path, text, version, cuda):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.setattr(tree.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tree.sysconfig, "get_paths", lambda **_: {"purelib": str(tmp_path), "platlib": str(tmp_path)})
    assert tree.find_torch() == (tmp_path / "torch", version, cuda)


def test_import_without_a_compiler_warns_once_and_runs(tmp_path):
    shutil.copytree(pathlib.Path(installed.__file__).parent, tmp_path / "effkernels")
    shutil.copytree(installed.CSRC, tmp_path / "effkernels" / "csrc", dirs_exist_ok=True)
    code = "import torch, effkernels; print(effkernels.ops.bn_act.__module__, effkernels.__file__)"
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert str(tmp_path) in process.stdout
    assert process.stderr.count("effkernels runs without its C++ kernels: no C++ compiler: install g++") == 1


@pytest.mark.skipif(_native.BUILD.folder is None, reason=f"nothing is built: {_native.BUILD.missing['cpu']}")
class TestRealBuild:
    objects = _native.BUILD.folder and sorted((_native.BUILD.folder.parents[1] / "work").glob("*/cpu_kernel.cpp.*.o"))

    def test_every_op_is_compiled_for_every_instruction_set(self):
        built = sorted(f"{object.parent.name}/{object.name}" for object in self.objects)
        kernels = installed.sources("*/cpu_kernel.cpp")
        assert kernels
        assert built == sorted(f"{k.parent.name}/{k.name}.{isa}.o" for k in kernels for isa in installed.isas(k))

    @pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
    def test_instruction_set_units_share_no_symbols(self):
        """A weak symbol in two of them would let the linker take AVX-512 code for every CPU."""
        for object in self.objects:
            symbols = subprocess.run(["nm", "-C", str(object)], check=True, capture_output=True, text=True).stdout
            shared = [line for line in symbols.splitlines() if line[17:18] in "WwVvu"]
            assert not shared, f"{object.parent.name}/{object.name}: {shared}"

    def test_introspection(self):
        info = _native.introspection.build_info()
        assert info["cpu_isas"] == installed.isas()
        assert _native.introspection.cpu_isa() in _native.introspection.available_cpu_isas()

    def test_kernels_compile_for_aarch64(self):
        compiler = shutil.which("aarch64-linux-gnu-g++")
        if compiler is None:
            pytest.skip("needs aarch64-linux-gnu-g++ (Debian: apt install g++-aarch64-linux-gnu)")
        flags = [*installed.CXX_FLAGS, *installed.KERNEL_FLAGS, "-DEFFK_ISA=baseline", *installed.INCLUDES]
        for source in installed.sources("*/cpu_kernel.cpp"):
            subprocess.run([compiler, *flags, "-fsyntax-only", str(source)], check=True)


def number(build: installed.Build) -> int:
    """What the tiny op's library says, asked in a process of its own since a library is loaded once."""
    code = f"import ctypes; print(ctypes.CDLL({str(build.library('cpu'))!r}).number())"
    environment = os.environ | {"LD_LIBRARY_PATH": str(CPU.folder / "lib")}
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment).stdout)
