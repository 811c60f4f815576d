"""Train an EfficientNet of our own on random images: a starting point for a real training script.

python examples/train.py
"""

import torch
import torch.nn.functional as F

import effkernels


def main(steps: int = 5, image_size: int = 96, batch_size: int = 8) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = effkernels.models.create_model("efficientnet_b0", num_classes=10, device=device)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=device) % 10
    for step in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
