"""The simplest model of a GPU: what its memory and its arithmetic units take at their peak rates, and each launch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from effkernels.profiling.launches import Launch

LAUNCH_SECONDS = 2.5e-6  # assumed: the gap between two kernels of a stream that is never short of work
LEFT_OUT = (
    "latency, occupancy, caches (a tensor that fits the L2 cache costs as much as any other), activations and other "
    "arithmetic but multiply-adds, and the time of the host"
)


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most: bytes and operations per second, and the seconds that each launch takes."""

    bandwidth: float
    matrix: float  # convolutions and matrix products
    vector: float  # float32 operations outside matrix units: depthwise convolutions
    launch: float = 0.0

    def bound(self, launch: Launch) -> float:
        """The seconds that a launch takes at least."""
        flops = launch.flops
        return max(launch.bytes / self.bandwidth, flops.matrix / self.matrix, flops.depthwise / self.vector)

    def seconds(self, launches: Iterable[Launch]) -> float:
        """The modelled time of launches, one after another."""
        return sum(self.bound(launch) + self.launch * launch.kernels for launch in launches)


@dataclass(frozen=True)
class GPU:
    """A data sheet: bytes per second; operations per second in float32, and of dense matrix products, by dtype."""

    name: str
    bandwidth: float
    float32: float
    tensor_cores: Mapping[torch.dtype, float]

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Those of float32 are without TF32.

        Raises:
            ValueError: the GPU has no such arithmetic.
        """
        peaks = {torch.float32: self.float32, **self.tensor_cores}
        if dtype not in peaks:
            known = ", ".join(str(d).removeprefix("torch.") for d in peaks)
            raise ValueError(f"dtype must be one of {known} on {self.name}, got {str(dtype).removeprefix('torch.')}")
        return Ceilings(self.bandwidth, peaks[dtype], self.float32, LAUNCH_SECONDS)


def _sixteen_bits(rate: float) -> dict[torch.dtype, float]:
    return {torch.float16: rate, torch.bfloat16: rate}


# NVIDIA's data sheets: A100 (80 GB, SXM), H100 (SXM), L4, T4; for the GeForce, whose sheet has no such figures, the
# white paper of the Ada architecture, with sums in float32. Dense rates, where a sheet gives those with sparsity half.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100", 2039e9, 19.5e12, _sixteen_bits(312e12)),
        GPU("H100", 3350e9, 67e12, _sixteen_bits(989.5e12)),
        GPU("L4", 300e9, 30.3e12, _sixteen_bits(121e12)),
        GPU("T4", 320e9, 8.1e12, {torch.float16: 65e12}),
        GPU("RTX4090", 1008e9, 82.6e12, _sixteen_bits(165.2e12)),
    )
}
