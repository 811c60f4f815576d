"""EfficientNet-B0's blocks in inference on GPUs, modelled: `python tests/ptx/inference.py` prints a table.

ptxrun executes the launches of each block on the CPU and counts their sectors and instructions; at the published rates
of a GPU that makes a time, without latency or occupancy.
"""

import pathlib
import sys
from collections import Counter

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # as pytest does

import emulated_cuda
import torch

from effkernels.models.configs import CONFIGS
from effkernels.ops.mbconv_inference.cases import MbconvInference

BATCH = 4
GPUS = ("A100", "H100", "L4", "RTX4090")
HEAD = ("block", "times", "launches", "MB", *GPUS)


def blocks() -> Counter[MbconvInference]:
    """Those of the network, each as often as it occurs."""
    config, found = CONFIGS["efficientnet_b0"], Counter[MbconvInference]()
    channels, size = config.stem_channels, config.resolution // 2
    for stage in config.stages:
        for i in range(stage.repeats):
            stride = 1 if i else stage.stride
            case = MbconvInference(
                dtype=torch.float16, shape=(BATCH, channels, size, size), outputs=stage.out_channels,
                ratio=stage.expand_ratio if stage.expand_ratio > 1 else 0, kernel_size=stage.kernel_size, stride=stride,
                squeezed=int(channels * stage.se_ratio), residual=stride == 1 and channels == stage.out_channels,
            )  # fmt: skip
            found[case] += 1
            channels, size = stage.out_channels, size // stride
    return found


def main() -> None:
    emulated_cuda.options = {"profile": True}
    total = [0.0] * (2 + len(GPUS))
    print(f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * (len(HEAD) - 1), sep="\n")
    with emulated_cuda.installed():
        for case, times in blocks().items():
            emulated_cuda.launches.clear()
            case.op("cuda", *case.arguments())
            results = [launch.result for launch in emulated_cuda.launches]
            megabytes = sum(r.profile.dram_bytes for r in results) / 1e6
            modelled = [[emulated_cuda.ptxrun.estimate(r, gpu) for r in results] for gpu in GPUS]
            cells = [f"{sum(e.modelled_us for e in of):.1f} ({', '.join(e.limiter for e in of)})" for of in modelled]
            row = [len(results), megabytes, *(sum(e.modelled_us for e in of) for of in modelled)]
            total = [a + times * b for a, b in zip(total, row, strict=True)]
            (_, c, h, _), k = case.shape, case.kernel_size
            name = f"{c} to {case.outputs}, {h}x{h}, {k}x{k}, stride {case.stride}"
            print(f"| {name} | {times} | {len(results)} | {megabytes:.2f} | {' | '.join(cells)} |", flush=True)
    launches, *amounts = total
    print(f"| all | | {launches:.0f} | {' | '.join(f'{amount:.1f}' for amount in amounts)} |")


if __name__ == "__main__":
    main()
