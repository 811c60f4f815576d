"""Compile what includes PyTorch's headers against those of the oldest release that is supported, as pip has it.

The kernels themselves know nothing of PyTorch.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

from effkernels import _build

VERSION = ".".join(map(str, _build.MINIMUM_TORCH)) + ".*"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*pip, f"torch=={VERSION}"], check=True)
        (wheel,) = pathlib.Path(folder).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
        nvcc = _build.find_nvcc()
        cuda = [] if nvcc is None else ["-isystem", str(pathlib.Path(nvcc).parents[1] / "include")]
        flags = [*_build.CXX_FLAGS, *_build.INCLUDES, *_build.STABLE_ABI, "-isystem", f"{folder}/torch/include", *cuda]
        sources = [*_build.sources("*/cpu.cpp"), *(_build.sources("*/cuda.cpp") if nvcc else [])]

        def compiles(source: pathlib.Path) -> bool:
            define = ["-DUSE_CUDA"] if source.name == "cuda.cpp" else []
            command = [_build.find_cxx() or "g++", "-fsyntax-only", *flags, *define, str(source)]
            return subprocess.run(command).returncode == 0

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            fine = list(pool.map(compiles, sources))
        print(f"{wheel.name}: {sum(fine)} of {len(sources)} sources compile")
        sys.exit(not all(fine))


if __name__ == "__main__":
    main()
