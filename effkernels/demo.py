"""`effkernels demo`: `effkernels profile` of EfficientNet-B0 in inference."""

import torch

from effkernels import profile
from effkernels.profile import OUT, Image, Out, Threads


def demo(image: Image = None, out: Out = OUT, threads: Threads = None) -> None:
    """Run EfficientNet-B0 eager and converted: the same answers, and what each block costs."""
    profile.run("efficientnet_b0", image, profile.default_device(), 8, torch.float32, False, out, threads)
