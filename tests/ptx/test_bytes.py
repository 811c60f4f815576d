"""What the CUDA kernels read and write, counted while ptxrun executes them, is what their ops' `bytes` say."""

import emulated_cuda
import pytest
import traffic

if reason := emulated_cuda.why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    with emulated_cuda.installed():
        yield


@pytest.mark.parametrize("case", traffic.countable_cases(), ids=str)
def test_bytes(case):
    for tensor in traffic.count(case):
        # A part of a tensor may begin and end in the middle of a sector, in every row.
        assert tensor.unique >= tensor.bytes
        if tensor.whole:
            assert tensor.unique == traffic.sectors(tensor.bytes), tensor.name


@pytest.mark.parametrize("case", traffic.table_cases(), ids=str)
def test_waste(case):
    """A main tensor in channels_last with C a multiple of 8 comes in whole sectors; halos are bounded."""
    tensors = {tensor.name: tensor for tensor in traffic.count(case)}
    assert tensors["x"].factor <= 2
    if case.layout == "channels_last":
        assert all(tensors[name].wasted == 0 for name in ("x", "y") if name in tensors)


def test_table():
    assert traffic.TABLE.read_text() == traffic.table(), "run `python tests/ptx/traffic.py`"
