"""The Triton kernels as compiled for a GPU, executed on the CPU by ptxrun, which also finds races and bad accesses."""

import os
import re
import sys

import pytest
import torch

from effkernels.ops._activation import Activation
from effkernels.ops._cases import Norm, cases_for
from effkernels.ops.batch_norm.cases import SILU, BnApply, BnBackward, BnBackwardSums, BnPool, BnResidual, BnStatistics
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv.cases import Dwconv, DwconvBackward
from effkernels.ops.pointwise.cases import Pointwise, PointwiseBackward

FOLDER = os.environ.get("EFFKERNELS_PTXRUN")
if not FOLDER:
    pytest.skip("EFFKERNELS_PTXRUN does not name the folder that holds ptxrun/", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")
sys.path.insert(0, FOLDER)
import ptxrun  # noqa: E402

# Lanes that hold copies of a sum all store it, as Triton compiles reductions. That they store the same bits is seen in
# the results, which would otherwise depend on the order of lanes.
REDUNDANT_STORE = re.compile(r"at PTX line (\d+): .*; write after write by thread \d+ at line \1:", re.DOTALL)

CASES = cases_for("triton", "core")
# An instance takes seconds to compile: some of them for the other architecture too.
RUNS = [(80, case) for case in CASES] + [(90, case) for case in CASES[::4]]


@pytest.mark.slow
@pytest.mark.parametrize("chip, case", RUNS, ids=[f"sm_{chip}-{case}" for chip, case in RUNS])
def test_case(chip, case):
    """Right results, the same ones in every order of blocks, warps and lanes."""
    outputs = []
    with ptxrun.triton_fixture(chip, race=True) as driver:
        for driver.options["order"] in ("fwd", "rev", "rand"):
            outputs.append(case.check("triton"))
    assert driver.results or any(t.numel() == 0 for t in case.arguments() if isinstance(t, torch.Tensor))
    for result in driver.results:
        assert not result.errors and not result.unsupported
        assert [w for w in result.warnings if not REDUNDANT_STORE.search(w)] == []
    for others in outputs[1:]:
        torch.testing.assert_close(others, outputs[0], rtol=0, atol=0, equal_nan=True)


LAUNCHES = {
    "dwconv": 1, "bn_statistics": 2, "bn_apply": 1, "spatial_mean": 1, "se_gate": 2, "se_gate_backward": 2,
    "channel_scale": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    case = next(case for case in CASES if case.op.name == name and case.arguments()[0].numel())
    with ptxrun.triton_fixture(80) as driver:
        case.check("triton")
    assert len(driver.results) == LAUNCHES[name]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_every_value_is_loaded_in_full_sectors(layout):
    of_map = dict(shape=(4, 96, 28, 28), layout=layout, dtype=torch.float16)
    silu = Norm(Activation.SILU)
    with ptxrun.triton_fixture(80, profile=True) as driver:
        Dwconv(**of_map, epilogue=silu).check("triton")
        BnApply(**of_map, norm=silu).check("triton")
    conv, apply = (r.profile for r in driver.results)
    size = 4 * 96 * 28 * 28 * 2
    for profile in (conv, apply):
        # The smallest number of sectors that hold x and y: nothing else is touched.
        assert 32 * profile.buffer("x_ptr").unique_loaded == size
        assert 32 * profile.buffer("y_ptr").unique_stored == size
    assert apply.buffer("x_ptr").load_efficiency == apply.buffer("y_ptr").store_efficiency == 1
    assert conv.buffer("x_ptr").load_efficiency >= (1 if layout == "channels_last" else 0.65)
    # What a block reads again is rows above its band and columns beside its tile.
    assert conv.buffer("x_ptr").block_sectors * 32 <= 1.8 * size


MAPS = {"grad_ptr", "x_ptr", "y_ptr", "residual_ptr", "out_ptr"}


def _of_training(layout):
    """Each phase as a training step calls it, on dense maps of whole sectors."""
    of_map = dict(shape=(2, 32, 16, 16), layout=layout, dtype=torch.float16)
    return [
        BnStatistics(**of_map),
        BnPool(slopes=True, **of_map),
        BnResidual(scale=True, **of_map),
        BnBackwardSums(scaled=True, **of_map),
        BnBackward(scaled=True, **of_map),
        Dwconv(prologue=SILU, reduce=Reduce.STATISTICS, **of_map),
        *(DwconvBackward(prologue=SILU, stride=stride, **of_map) for stride in (1, 2)),
        Pointwise(outputs=48, norm=SILU, gated=True, reduce=Reduce.STATISTICS, **of_map),
        PointwiseBackward(outputs=32, gated=True, **of_map),  # of more, two launches each read all
    ]


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for layout in ("nchw", "channels_last") for c in _of_training(layout)], ids=str)
def test_maps_are_read_and_written_once(case):
    """The maps of a training phase move as its `bytes` say, not a sector more."""
    arguments = case.arguments()
    with ptxrun.triton_fixture(80, profile=True) as driver:
        outputs = case.op("triton", *arguments)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    schema = next(iter(case.op.overloads.values()))._schema
    tensors = zip((*schema.arguments, *schema.returns), (*arguments, *outputs), strict=True)
    maps = {a.name or "result" for a, t in tensors if isinstance(t, torch.Tensor) and t.dim() == 4}
    maps -= {"weight", "grad_weight"}
    said = case.op.bytes(arguments, outputs)
    buffers = [b for result in driver.results for b in result.profile.buffers if MAPS & {*b.name.split()}]
    assert 32 * sum(b.unique_loaded + b.unique_stored for b in buffers) == sum(said[name] for name in maps)
