"""Problems whose kernels are executed with every tile that they may have."""

import torch

from effkernels.ops import _tiles, use_tile
from effkernels.ops._cases import Case
from effkernels.ops.batch_norm.op import Reduce
from effkernels.ops.dwconv.cases import Dwconv, DwconvBackward
from effkernels.ops.expand_dwconv.cases import NOTHING, ExpandDwconv, ExpandDwconvBackward
from effkernels.ops.pointwise_inference.cases import PointwiseInference

f16, bf16 = torch.float16, torch.bfloat16
# Maps of several strips and columns of tiles, channels of several groups, the last ones hanging over.
CASES: list[Case] = [
    ExpandDwconv(shape=(1, 24, 15, 17), hidden=72, dtype=f16),
    ExpandDwconv(shape=(1, 16, 23, 11), hidden=40, dtype=bf16, kernel_size=5, stride=2, padding="same"),
    ExpandDwconv(shape=(1, 5, 9, 8), hidden=18, layout="nchw", norm2=NOTHING, reduce=Reduce.STATISTICS),
    ExpandDwconvBackward(shape=(1, 16, 9, 10), hidden=40, dtype=f16),
    Dwconv(shape=(1, 20, 15, 17), dtype=f16, layout="channels_last", kernel_size=5),
    Dwconv(shape=(2, 5, 9, 13), layout="nchw", stride=2, padding="same"),
    DwconvBackward(shape=(1, 20, 9, 10), dtype=f16, layout="channels_last"),
    DwconvBackward(shape=(2, 3, 9, 10), layout="nchw", stride=2, padding="same"),
    PointwiseInference(shape=(1, 20, 13, 11), outputs=72, dtype=f16, residual=True),
]


def launch_of(case: Case) -> _tiles.Launch:
    with _tiles.recorded() as launches:
        case.op("cuda", *case.arguments())
    (launch,) = launches
    return launch


def check(case: Case, tile: _tiles.Tile, device: str = "cpu") -> None:
    """Whether the kernel of the case takes this tile, and gives the right results with it."""
    names = _tiles.NUMBERS[case.op.name]
    with use_tile(case.op.name, **dict(zip(names, tile, strict=True))), _tiles.recorded() as launches:
        case.check("cuda", device)
    assert {launch.tile for launch in launches} == {tile}
