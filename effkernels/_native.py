"""The compiled libraries: found, loaded, and if not, why not."""

import importlib.util
import pathlib

import torch

MISSING: dict[str, str | None] = {
    "cpp": "not built",
    "cuda": "not built",
    "triton": None if importlib.util.find_spec("triton") else "triton is not installed",
}
for _so in pathlib.Path(__file__).parent.glob("libeffkernels_cpu*.so"):
    torch.ops.load_library(_so)
    MISSING["cpp"] = None
