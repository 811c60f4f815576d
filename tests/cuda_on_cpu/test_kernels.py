"""The CUDA kernels on the CPU, under the address and undefined-behaviour sanitisers, against float64.

In a process of its own, which tests/ops/test_cuda_on_cpu.py starts.
"""

import os
import pathlib
import zlib

import library
import pytest
import tiles
import torch
from hypothesis import given, settings
from shape_classes import sample
from strategies import drawn_cases

from effkernels.ops._cases import cases_for

LOADED, REGISTRATIONS = library.install(pathlib.Path(os.environ["EFFKERNELS_CUDA_ON_CPU"]))


@pytest.mark.parametrize("case", cases_for("cuda"), ids=str)
def test_case(case):
    LOADED.cuda_on_cpu_set_seed(zlib.crc32(str(case).encode()))
    case.check("cuda")


@settings(max_examples=100)
@given(drawn_cases("cuda"))
def test_drawn_case(case):
    case.check("cuda")


@pytest.mark.parametrize("case", cases_for("cuda", "core"), ids=str)
def test_same_bits_in_any_order(case):
    results = []
    for seed in (1, 2):
        LOADED.cuda_on_cpu_set_seed(seed)
        results.append(case.op("cuda", *case.arguments()))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("small", sample().values(), ids=str)
def test_class_of_blocks(small):
    LOADED.cuda_on_cpu_set_multiprocessors(small.multiprocessors)
    try:
        small.case().check("cuda")
    finally:
        LOADED.cuda_on_cpu_set_multiprocessors(108)


@pytest.mark.parametrize("case", tiles.CASES, ids=str)
def test_every_tile(case):
    launch = tiles.launch_of(case)
    assert len(launch.tiles) >= 3
    for tile in launch.tiles:
        tiles.check(case, tile)
