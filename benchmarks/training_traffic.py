"""Count what the kernels of a training step read and write of the maps of EfficientNet-B0's blocks: a table in docs/.

python benchmarks/training_traffic.py > docs/training_traffic.md
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effkernels
from effkernels.ops._op import COMPOSITIONS, OPS

BATCH = 3  # no weight begins with a dimension of 3
SIZE = 224

HEADER = f"""# Memory traffic of a training step

What the kernels read and write of the maps, in MB (10^6 bytes) per image: the blocks of EfficientNet-B0 at
{SIZE}x{SIZE} in float16, forward and backward, each map of a call once, by the ops' `bytes()`. Made by
`python benchmarks/training_traffic.py`. Weights and vectors, and rows that a window reads again, come on top.
"""


class Recorder(TorchDispatchMode):
    """Of each kernel, its calls and the bytes of its maps per image; all ops but ours count as one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in COMPOSITIONS:
            with self:
                return COMPOSITIONS[func](*args)
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        if func in OPS:
            kernel, amounts = OPS[func].name, OPS[func].bytes(args, result)
            names = [a.name or "result" for a in (*func._schema.arguments, *func._schema.returns)]
            maps = {t.data_ptr(): amounts[n] for n, t in zip(names, (*args, *outputs), strict=True) if _is_map(t)}
        elif func.is_view or "empty" in func.__name__ or "new_" in func.__name__:
            return result
        else:
            kernel = "PyTorch's own"
            # What is altered in place is read and written.
            maps = {(i, t.data_ptr()): t.nbytes for i, ts in enumerate((args, outputs)) for t in ts if _is_map(t)}
        if maps:
            self.calls[kernel] += 1
            self.bytes[kernel] += sum(maps.values()) // BATCH // 2  # as float16
        return result


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[0] == BATCH and value.shape[2] > 1


def budget(blocks: Any, x: Tensor) -> int:
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
    torch.manual_seed(0)
    blocks = [block for stage in effkernels.models.create_model("efficientnet_b0").stages for block in stage]
    x = torch.randn(BATCH, blocks[0].depthwise.conv.in_channels, SIZE // 2, SIZE // 2, requires_grad=True)
    forward, backward = Recorder(), Recorder()
    with effkernels.use_backend("cpp"):
        with forward:
            y = nn.Sequential(*blocks)(x)
        grad = torch.randn_like(y)
        with backward:
            y.backward(grad)
        with torch.no_grad():
            allowed = budget(blocks, x)
    runs = forward, backward
    totals = forward.bytes + backward.bytes
    print(HEADER)
    print("| kernel | calls | forward | calls | backward |\n|---|---:|---:|---:|---:|")
    for name, _ in totals.most_common():
        cells = (f"{r.calls[name]} | {r.bytes[name] / 1e6:.1f}" if r.calls[name] else " | " for r in runs)
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| all | | {forward.bytes.total() / 1e6:.1f} | | {backward.bytes.total() / 1e6:.1f} |")
    print(f"\nTogether {totals.total() / 1e6:.1f}; the budget of passes is {allowed / 1e6:.1f}.")


if __name__ == "__main__":
    main()
