"""Small blocks of the classes of MBConv blocks that the networks have, executed by ptxrun, against float64."""

import emulated_cuda
import pytest
import torch
from shape_classes import PAGE, classes, classified, sample, table
from test_cuda import ORDERS

from effkernels.models.configs import CONFIGS

if reason := emulated_cuda.why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def gpu():
    with emulated_cuda.installed() as library:
        yield library
        library.cuda_on_cpu_set_multiprocessors(108)


def pytest_generate_tests(metafunc):
    if "shape_class" in metafunc.fixturenames:
        chosen = classes() if metafunc.config.getoption("--all-classes") else sample()
        step = 1 if metafunc.function is test_float16 else 8
        metafunc.parametrize("shape_class", list(chosen)[::step], ids=str)


def check(gpu, shape_class, dtype):
    small = classes()[shape_class]
    gpu.cuda_on_cpu_set_multiprocessors(small.multiprocessors)
    results = []
    for order in ORDERS:
        emulated_cuda.options.clear()
        emulated_cuda.options.update(race=True, order=order)
        emulated_cuda.launches.clear()
        results.append(small.case(dtype).check("cuda"))
    for others in results[1:]:
        torch.testing.assert_close(others, results[0], rtol=0, atol=0)


def test_float16(gpu, shape_class):
    check(gpu, shape_class, torch.float16)
    kernels = [launch.kernel for launch in emulated_cuda.launches]
    assert len(kernels) == shape_class.launches
    assert any("expand_dwconv" in kernel for kernel in kernels) == (shape_class.expansion == "inside")


# Only the code for bfloat16 differs between architectures: test_cuda.py.
@pytest.mark.parametrize(
    "arch, dtype", [("sm_80", torch.bfloat16), ("sm_90", torch.bfloat16), ("sm_80", torch.float32)]
)
def test_other_dtypes(gpu, monkeypatch, shape_class, arch, dtype):
    monkeypatch.setattr(emulated_cuda, "arch", arch)
    check(gpu, shape_class, dtype)


@pytest.mark.parametrize("model", CONFIGS)
def test_every_block_has_a_class(model):
    assert {shape_class for _, shape_class in classified(model)} <= {*classes()}


def test_table():
    assert table() in PAGE.read_text(), "print it by `python tests/shape_classes.py`"
