"""What a model costs, block by block: measured time, and bytes and operations counted from the ops that run."""

from effkernels.profiling.gpus import GPUS, Ceilings
from effkernels.profiling.launches import Launch, count_bytes, record
from effkernels.profiling.meta import as_on_gpu, gpu_backend, on_meta
from effkernels.profiling.timing import Spread, time_blocks
from effkernels.profiling.workload import Workload

__all__ = [
    "GPUS",
    "Ceilings",
    "Launch",
    "Spread",
    "Workload",
    "as_on_gpu",
    "count_bytes",
    "gpu_backend",
    "on_meta",
    "record",
    "time_blocks",
]
