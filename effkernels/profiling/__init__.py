"""What a model costs, block by block: measured time, and bytes counted from the ops that run."""

from effkernels.profiling.timing import Spread, time_blocks
from effkernels.profiling.traffic import block_bytes, count_bytes

__all__ = ["Spread", "block_bytes", "count_bytes", "time_blocks"]
