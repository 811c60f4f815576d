"""Count what the kernels of a training step read and write of the maps of EfficientNet-B0's blocks: a table in docs/.

python benchmarks/training_traffic.py > docs/training_traffic.md
"""

import sys
from collections import Counter
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn

import effkernels
from effkernels import backends
from effkernels.profiling import as_on_gpu, on_meta, record
from effkernels.profiling.workload import BACKWARD, FORWARD

BATCH = 8
SIZE = 224

HEADER = f"""# Memory traffic of a training step

What the kernels read and write of the maps, in MB (10^6 bytes) per image: the blocks of EfficientNet-B0 at
{SIZE}x{SIZE} in float16, forward and backward, each map of a call once, by the ops' `bytes()`. Made by
`python benchmarks/training_traffic.py`. Weights and vectors, and rows that a window reads again, come on top.
"""
KEPT = """
## With the expanded map in memory

By Triton, as the CPU has it too.
"""
ON_CHIP = """
## With the expanded map on chip

By C++ on the CPU, if every block had it so; the rule takes those of few channels ([training.md](training.md)).
"""


def budget(blocks: nn.Sequential, x: Tensor, of_x: int, of_e: int) -> int:
    """Passes over x and e, 7 over d and y, and one more over x and y where there is a shortcut."""
    total = 0
    for block in blocks:
        y = block(x)
        hidden = block.depthwise.conv.out_channels
        e = 0 if block.expand is None else hidden * x[0, 0].numel()
        d = hidden * y[0, 0].numel()
        total += of_x * x[0].numel() + of_e * e + 7 * d + 7 * y[0].numel()
        total += x[0].numel() + y[0].numel() if block.has_shortcut else 0
        x = y
    return 2 * total


def print_table(backend: str, of_x: int, of_e: int) -> None:
    blocks = nn.Sequential(
        *(block for stage in effkernels.models.create_model("efficientnet_b0").stages for block in stage)
    )
    shape = BATCH, blocks[0].depthwise.conv.in_channels, SIZE // 2, SIZE // 2
    step = on_meta(blocks, shape, torch.float16, train=True, backend=backend)
    x = step.x.contiguous(memory_format=torch.channels_last).requires_grad_()  # as behind a stem
    step = replace(step, x=x)
    launches = record(step, [name for name, _ in blocks.named_children()]).launches
    with torch.no_grad(), effkernels.use_backend("eager"):
        allowed = budget(step.model, x.detach(), of_x, of_e)
    calls: dict[str, Counter[str]] = {phase: Counter() for phase in (FORWARD, BACKWARD)}
    moved: dict[str, Counter[str]] = {phase: Counter() for phase in (FORWARD, BACKWARD)}
    for launch in launches:
        maps = {(t.memory, t.read, t.written) for t in launch.touches if t.is_map}  # x may be two of a call's arguments
        amount = sum(read + written for _, read, written in maps)
        if launch.block and amount:
            kernel = "PyTorch's own" if launch.op.startswith("aten::") else launch.op
            calls[launch.phase][kernel] += 1
            moved[launch.phase][kernel] += amount // BATCH
    totals = moved[FORWARD] + moved[BACKWARD]
    print("| kernel | calls | forward | calls | backward |\n|---|---:|---:|---:|---:|")
    for name, _ in totals.most_common():
        cells = (f"{calls[p][name]} | {moved[p][name] / 1e6:.1f}" if calls[p][name] else " | " for p in moved)
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| all | | {moved[FORWARD].total() / 1e6:.1f} | | {moved[BACKWARD].total() / 1e6:.1f} |")
    print(f"\nTogether {totals.total() / 1e6:.1f}; the budget of passes is {allowed / 1e6:.1f}.")


def main() -> None:
    rule = sys.modules["effkernels.ops.mbconv"]  # whose name is that of the op too
    with as_on_gpu(), mock.patch.dict(backends.DEVICES, cpp=("meta",)):
        print(HEADER, KEPT, sep="")
        print_table("triton", of_x=5, of_e=6)
        print(ON_CHIP)
        with mock.patch.object(rule, "CHANNELS_ON_CHIP", 10**6):
            print_table("cpp", of_x=7, of_e=0)


if __name__ == "__main__":
    main()
