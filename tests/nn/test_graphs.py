"""CUDA graphs of converted models."""

import pytest
import torch

import effkernels


@pytest.mark.parametrize(
    "model, example, message",
    [
        (lambda x: x, torch.ones(1), "model must be an nn.Module, got function"),
        (torch.nn.ReLU(), [1], "example must be a torch.Tensor, got list"),
        (torch.nn.ReLU(), torch.ones(1), "example must be on a CUDA device, got cpu"),
    ],
)
def test_what_cannot_be_captured(model, example, message):
    with pytest.raises((TypeError, ValueError), match=message):
        effkernels.graph(model, example)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_graph(memory_format):
    model = effkernels.MBConv(16, 16, drop_path=0.5).cuda().eval().to(memory_format=memory_format)
    x, other = (torch.randn(2, 16, 14, 14, device="cuda").to(memory_format=memory_format) for _ in range(2))
    graph = effkernels.graph(model, x)
    with torch.no_grad():
        kept, expected = graph(x), model(x)
        torch.testing.assert_close(graph(other), model(other), rtol=0, atol=0)
        torch.testing.assert_close(kept, expected, rtol=0, atol=0)  # outputs are the caller's
        model.project.bn.weight.mul_(2)
        torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"x must have the shape of the example, .*14, 14.*, got .*13, 13"):
        graph(x[..., 1:, 1:])
    with pytest.raises(ValueError, match="x must have the dtype of the example"):
        graph(x.half())
    with pytest.raises(ValueError, match="call eval"):
        effkernels.graph(model.train(), x)
