"""EfficientNet-B0's blocks in inference on GPUs, modelled: `python tests/ptx/inference.py` prints a table.

ptxrun executes the launches of each block on the CPU and counts their sectors and instructions; at the published rates
of a GPU that makes a time, without latency or occupancy.
"""

import pathlib
import sys

if __name__ == "__main__":
    tests = pathlib.Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests.with_name("benchmarks"))]  # as pytest does

import emulated_cuda
from shape_classes import blocks, case_of

BATCH = 4
GPUS = ("A100", "H100", "L4", "RTX4090")
HEAD = ("block", "times", "launches", "MB", *GPUS)


def main() -> None:
    emulated_cuda.options = {"profile": True}
    total = [0.0] * (2 + len(GPUS))
    print(f"| {' | '.join(HEAD)} |", "|---|" + "---:|" * (len(HEAD) - 1), sep="\n")
    with emulated_cuda.installed():
        for block, times in blocks("efficientnet_b0").items():
            case = case_of(block, BATCH, block.size)
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
