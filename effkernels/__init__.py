"""Fused kernels for EfficientNet-style networks."""

from effkernels import ops
from effkernels.backends import use_backend

__version__ = "0.1.0"
__all__ = ["ops", "use_backend"]
