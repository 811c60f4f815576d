"""What a model costs, block by block: measured time, and bytes and operations counted from the ops that run."""

from effkernels.profiling.gpus import GPUS, Ceilings
from effkernels.profiling.launches import Launch, count_bytes, record
from effkernels.profiling.meta import GPU_BACKEND, as_on_gpu, on_meta
from effkernels.profiling.timing import Spread, time_blocks
from effkernels.profiling.workload import Workload

__all__ = [
    "GPUS",
    "GPU_BACKEND",
    "Ceilings",
    "Launch",
    "Spread",
    "Workload",
    "as_on_gpu",
    "count_bytes",
    "on_meta",
    "record",
    "time_blocks",
]
