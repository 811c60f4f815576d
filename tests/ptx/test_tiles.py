"""The CUDA kernels with other tiles than the heuristics', executed by ptxrun, against float64."""

import emulated_cuda
import pytest
import tiles

from effkernels.nn import tuning

if reason := emulated_cuda.why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    with emulated_cuda.installed():
        emulated_cuda.options.clear()
        emulated_cuda.options.update(race=True, order="rand")
        yield


@pytest.mark.parametrize("case", tiles.CASES, ids=str)
def test_tiles(case):
    """Those that autotune times, and some of the others; all of them run in C++ (tests/cuda_on_cpu)."""
    cheapest_first = tiles.launch_of(case).tiles
    for tile in {*cheapest_first[: tuning.CONTENDERS], *cheapest_first[tuning.CONTENDERS :: 10]}:
        tiles.check(case, tile)


@pytest.mark.parametrize("case", tiles.CASES[:-1], ids=str)
def test_tiles_of_any_width(case):
    """Also those that the search does not consider are either refused or right."""
    group, strips, _ = tiles.launch_of(case).tiles[0]
    right = 0
    for width in (1, 5, 16, 64):
        try:
            tiles.check(case, (group, strips, width))
            right += 1
        except ValueError as refused:
            assert "tile must have" in str(refused)
    assert right
