"""Swap the blocks of a torchvision model to fused ones, and see what changed and what did not.

python examples/swap.py
"""

import copy
import time

import torch
import torchvision

import effkernels


def main(image_size: int = 224, batch_size: int = 8) -> None:
    torch.manual_seed(0)
    model = torchvision.models.efficientnet_b0().eval()
    fused = effkernels.convert(copy.deepcopy(model))
    images = torch.randn(batch_size, 3, image_size, image_size)
    print(effkernels.conversion_report(fused))

    with torch.inference_mode():
        difference = (fused(images) - model(images)).norm() / model(images).norm()
        print(f"relative difference of the outputs: {difference:.1e}")
        for name, network in (("eager", model), ("effkernels", fused)):
            start = time.perf_counter()
            network(images)
            print(f"{name}: {1000 * (time.perf_counter() - start):.0f} ms")
        print(effkernels.explain(fused.features[2][1], torch.randn(batch_size, 24, 56, 56)))


if __name__ == "__main__":
    main()
