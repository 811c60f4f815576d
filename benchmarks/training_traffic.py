"""Count what the kernels of a training step read and write of the maps of EfficientNet-B0's blocks: a table in docs/.

python benchmarks/training_traffic.py > docs/training_traffic.md
"""

from collections import Counter

import torch
from torch import Tensor, nn

import effkernels
from effkernels.profiling import as_on_gpu, on_meta, record
from effkernels.profiling.workload import BACKWARD, FORWARD

BATCH = 8
SIZE = 224

HEADER = f"""# Memory traffic of a training step

What the kernels read and write of the maps, in MB (10^6 bytes) per image: the blocks of EfficientNet-B0 at
{SIZE}x{SIZE} in float16, forward and backward, each map of a call once, by the ops' `bytes()`. Made by
`python benchmarks/training_traffic.py`. Weights and vectors, and rows that a window reads again, come on top.
"""


def budget(blocks: nn.Sequential, x: Tensor) -> int:
    """5 passes over x, 6 over e, 7 over d and y, and one more over x and y where there is a shortcut."""
    total = 0
    for block in blocks:
        y = block(x)
        hidden = block.depthwise.conv.out_channels
        e = 0 if block.expand is None else hidden * x[0, 0].numel()
        d = hidden * y[0, 0].numel()
        total += 5 * x[0].numel() + 6 * e + 7 * d + 7 * y[0].numel()
        total += x[0].numel() + y[0].numel() if block.has_shortcut else 0
        x = y
    return 2 * total


def main() -> None:
    blocks = nn.Sequential(
        *(block for stage in effkernels.models.create_model("efficientnet_b0").stages for block in stage)
    )
    shape = BATCH, blocks[0].depthwise.conv.in_channels, SIZE // 2, SIZE // 2
    with as_on_gpu():
        step = on_meta(blocks, shape, torch.float16, train=True, backend="triton")
        step.x.requires_grad_()  # as behind a stem
        launches = record(step, [name for name, _ in blocks.named_children()]).launches
    with torch.no_grad(), effkernels.use_backend("eager"):
        allowed = budget(step.model, step.x.detach())
    calls: dict[str, Counter[str]] = {phase: Counter() for phase in (FORWARD, BACKWARD)}
    moved: dict[str, Counter[str]] = {phase: Counter() for phase in (FORWARD, BACKWARD)}
    for launch in launches:
        amount = sum(t.read + t.written for t in launch.touches if t.is_map)
        if launch.block and amount:
            kernel = "PyTorch's own" if launch.op.startswith("aten::") else launch.op
            calls[launch.phase][kernel] += 1
            moved[launch.phase][kernel] += amount // BATCH
    totals = moved[FORWARD] + moved[BACKWARD]
    print(HEADER)
    print("| kernel | calls | forward | calls | backward |\n|---|---:|---:|---:|---:|")
    for name, _ in totals.most_common():
        cells = (f"{calls[p][name]} | {moved[p][name] / 1e6:.1f}" if calls[p][name] else " | " for p in moved)
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| all | | {moved[FORWARD].total() / 1e6:.1f} | | {moved[BACKWARD].total() / 1e6:.1f} |")
    print(f"\nTogether {totals.total() / 1e6:.1f}; the budget of passes is {allowed / 1e6:.1f}.")


if __name__ == "__main__":
    main()
