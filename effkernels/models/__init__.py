"""The EfficientNet family, built from `effkernels.nn`."""

from effkernels.models.complexity import multiply_adds
from effkernels.models.configs import Config, Stage
from effkernels.models.efficientnet import EfficientNet, create_model, list_models
from effkernels.models.scaling import scale

__all__ = ["Config", "EfficientNet", "Stage", "create_model", "list_models", "multiply_adds", "scale"]
