"""What networks are shown."""

import pathlib

import torch
from torch import Tensor


def crops(image: pathlib.Path | None, size: int, batch: int) -> Tensor:
    """[batch, 3, size, size]: the corners of a photograph and their mirror images, again and again.

    Args:
        image: None: a portrait that comes with matplotlib.
    """
    from matplotlib import get_data_path
    from PIL import Image
    from torchvision.transforms import functional as transforms

    image = image or pathlib.Path(get_data_path(), "sample_data", "grace_hopper.jpg")
    photograph = transforms.resize(Image.open(image).convert("RGB"), [round(size * 8 / 7)])
    corners = torch.stack([transforms.to_tensor(crop) for crop in transforms.five_crop(photograph, [size])[:4]])
    both = torch.cat([corners, corners.flip(3)])
    both = transforms.normalize(both, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return both[torch.arange(batch) % len(both)]
