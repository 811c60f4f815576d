"""The CPU kernels under the address, undefined-behaviour and thread sanitisers: `python tests/sanitizers/run.py`.

Builds csrc/*/cpu_kernel.cpp for every instruction set, with the cases beside this file, and runs what this machine can
on 2 and 4 threads: of sets that only add products of bfloat16, those; in search of races, which are the same for all
sets, only the best of the others. A kernel's cases are in a file here, named after its folder; kernels without are
named as skipped.
"""

import os
import pathlib
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

from effkernels import _build, _native

HERE = pathlib.Path(__file__).parent
# And mistakes that each must find when the driver makes them.
SANITIZERS = {"address,undefined": ("read beyond", "overflow"), "thread": ("race",)}


def main() -> None:
    if _native.introspection is None:
        raise SystemExit(f"no introspection module: {_native.BUILD.missing['introspection']}")
    sources = _build.sources("*/cpu_kernel.cpp")
    kernels = [source for source in sources if (HERE / f"{source.parent.name}.cpp").exists()]
    skipped = [source.parent.name for source in sources if source not in kernels]
    if skipped:
        print(f"\n*** SKIPPED, not run under sanitizers: {', '.join(skipped)} have no cases in tests/sanitizers\n")
    with tempfile.TemporaryDirectory() as folder:
        for sanitizer, mistakes in SANITIZERS.items():
            driver = build(pathlib.Path(folder), sanitizer, kernels)
            for mistake in mistakes:
                if run(driver, "2", mistake).returncode == 0:
                    raise SystemExit(f"-fsanitize={sanitizer} does not find: {mistake}")
            isas = _native.introspection.available_cpu_isas()
            whole = [isa for isa in isas if isa not in _build.BFLOAT16_ISAS]
            for isa in whole[-1:] if sanitizer == "thread" else isas:
                for threads in ("2", "4"):
                    result = run(driver, threads, isa=isa)
                    print(f"-fsanitize={sanitizer}: {result.stdout}{result.stderr}", end="", flush=True)
                    if result.returncode:
                        raise SystemExit(1)


def build(folder: pathlib.Path, sanitizer: str, kernels: list[pathlib.Path]) -> pathlib.Path:
    # -O1, as the sanitisers' authors advise. Instrumented code makes GCC warn of variables that are initialised.
    flags = [*_build.CXX_FLAGS, "-O1", "-g", "-w", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    compile = [_build.find_cxx(), *flags, *_build.INCLUDES, f"-I{HERE}", "-c"]
    jobs: list[list[str]] = []
    for i, source in enumerate(sorted(HERE.glob("*.cpp"))):
        jobs.append([*compile, str(source), "-o", str(folder / f"{i}.o")])
    for kernel in kernels:
        for isa, isa_flags in _build.isas(kernel).items():
            target = folder / f"{kernel.parent.name}.{isa}.o"
            jobs.append(
                [*compile, *_build.KERNEL_FLAGS, *isa_flags, f"-DEFFK_ISA={isa}", str(kernel), "-o", str(target)]
            )
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        for job in [pool.submit(subprocess.run, job, check=True) for job in jobs]:
            job.result()
    driver = folder / "driver"
    objects = [job[-1] for job in jobs]
    subprocess.run([jobs[0][0], *flags, *objects, "-o", str(driver), "-lpthread"], check=True)
    return driver


def run(driver: pathlib.Path, *arguments: str, isa: str = "") -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"EFFKERNELS_CPU_ISA": isa, "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([str(driver), *arguments], env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    main()
