"""The CUDA kernels, compiled to PTX and executed on the CPU as they are launched, against float64.

ptxrun fails a test on an access out of bounds or misaligned, a race on shared memory, or a divergent barrier.
"""

import itertools
import re

import emulated_cuda
import pytest
import torch

from effkernels import _native
from effkernels.ops._cases import cases_for
from effkernels.ops.batch_norm.op import Reduce

if reason := emulated_cuda.why_not():
    pytest.skip(reason, allow_module_level=True)

CASES = cases_for("cuda", "core", "instance")
ORDERS = ("fwd", "rev", "rand")  # of blocks, warps and lanes


@pytest.fixture(scope="module")
def emulated():
    with emulated_cuda.installed():
        yield


# Code for sm_90 is the same but for bfloat16, as the last test says.
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(emulated, monkeypatch, case, arch):
    if arch == "sm_90" and case.dtype != torch.bfloat16:
        pytest.skip("the same code as for sm_80")
    monkeypatch.setattr(emulated_cuda, "arch", arch)
    results = []
    for order in ORDERS:
        emulated_cuda.options["order"] = order
        results.append(case.check("cuda"))
    for others in results[1:]:
        torch.testing.assert_close(others, results[0], rtol=0, atol=0, equal_nan=True)


def test_every_instance_is_launched():
    launched = set()
    with emulated_cuda.installed(lambda kernel, *rest: launched.add(kernel)):
        for case in CASES:
            case.op("cuda", *case.arguments())
    assert launched == set(instances("sm_80"))


def instances(arch):
    """The code of each kernel."""
    entries = [
        entry for text in emulated_cuda.texts(arch) for entry in re.split(r"(?=\.(?:visible|weak) \.entry)", text)
    ]
    return {match[1]: entry for entry in entries if (match := re.match(r"\.\w+ \.entry (\w+)", entry))}


def test_only_bfloat16_differs_between_architectures():
    ours, others = instances("sm_80"), instances("sm_90")
    assert {name for name in ours | others if ours[name] != others[name]} == {n for n in ours if "bfloat16" in n}


def test_products_run_on_matrix_instructions():
    multiplies = re.compile("pointwise_inference.*kernel|expand_dwconv.*kernel|dwconv_backward.*Lb1ELb1E")
    products = {name: code for name, code in instances("sm_80").items() if multiplies.search(name)}
    in_float32 = {name for name in products if "dwconv_backward" in name and "kernelIf" in name}
    assert {name for name, code in products.items() if "mma.sync" not in code} == in_float32
    assert len(products) == 45


def test_plans_stay_within_limits():
    none = ([0] * 4, 0.0, 0, 0)
    channels, sizes = (1, 3, 8, 96, 1152), ((1, 1), (1, 5000), (7, 7), (112, 112), (300, 3))
    for c, (h, w), k, stride, layout, dtype in itertools.product(
        channels, sizes, (3, 5, 7), (1, 2), ("nchw", "channels_last"), ("float32", "float16")
    ):
        out = [(size - 1) // stride + 1 for size in (h, w)]
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        maps = (torch.empty(s, device="meta", memory_format=memory_format) for s in ((5, c, h, w), (5, c, *out)))
        x, y = ((0, list(m.shape), list(m.stride())) for m in maps)
        window = dict(kernel_size=k, stride=stride, pad_top=k // 2, pad_left=k // 2)
        given = dict(x=x, y=y, dtype=dtype, channels_last=layout == "channels_last", weight=0, **window)
        plans = (
            _native.introspection.dwconv_plan(prologue=none, epilogue=none, reduce=Reduce.STATISTICS, **given),
            _native.introspection.dwconv_backward_plan(
                grad=y, after=(none, 0, 0, 0), before=none, grad_norm=x, need_weight=True, **given
            ),
        )
        for launch in itertools.chain(*(plan["launches"] for plan in plans)):
            assert 1 <= launch["block"] <= 256
            assert launch["shared_bytes"] <= 48 * 1024
            assert launch["grid"] >= 1
