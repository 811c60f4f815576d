"""The CUDA kernels on the CPU: what finds mistakes in them is tested here, they themselves in tests/cuda_on_cpu."""

import pathlib
import subprocess
import sys

import pytest
from cuda_on_cpu import library

from effkernels import _build

if reason := library.why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    program = tmp_path_factory.mktemp("planted") / "planted"
    source = library.FOLDER / "planted.cpp"
    subprocess.run(
        [_build.find_cxx(), *library.FLAGS, *library.SANITIZERS, str(source), "-o", str(program)], check=True
    )
    return program


@pytest.mark.parametrize(
    "mistake, found",
    {
        "nothing": "right results",
        "nothing, dynamic": "right results",
        "nothing, vectors": "right results",
        "nothing, shuffles": "right results",
        "missing barrier": "wrong results",
        "unwritten shared memory": "wrong results",
        "divergent barrier": "this thread and others wait at different barriers",
        "lanes outside the mask": "outside its mask",
        "beyond the end": "heap-buffer-overflow",
        "before the beginning": "heap-buffer-overflow",
        "beyond shared memory": "use-after-poison",
        "misaligned vector": "a misaligned access",
        "misaligned float4": "misaligned address",
    }.items(),
)
def test_finds(planted, mistake, found):
    result = subprocess.run([planted, mistake], capture_output=True, text=True)
    assert found in result.stdout + result.stderr
    assert (result.returncode == 0) == (found == "right results")


def test_kernels():
    """tests/cuda_on_cpu runs in a process of its own, which the sanitisers' runtime is loaded into first."""
    environment = library.sanitized_environment(library.build(*library.SANITIZERS))
    tests = pathlib.Path(library.__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert " passed" in result.stdout
