"""CUDA graphs: all launches of a model's inference as one."""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from effkernels import backends

WARMUPS = 3  # PyTorch's advice; the first compiles Triton's kernels and holds new ones against eager


def graph(model: nn.Module, example: Tensor) -> "Graph":
    """Capture the inference of `model` on inputs like `example` in a CUDA graph.

    Args:
        model: on a CUDA device, in eval mode, converted or not. It must not wait for the GPU.
        example: an input, whose shape, dtype and device every later one has too. Its memory layout is the fast one.

    Returns:
        A function of an input that returns what `model` does, in tensors of its own.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `example` not a tensor.
        ValueError: `example` is not on a CUDA device, or `model` is in training mode.
    """
    check_inference("graph", model, example)
    return Graph(model, example)


def check_inference(name: str, model: nn.Module, example: Tensor) -> None:
    """Raise unless the function of this name is given a model in eval mode and an example on a GPU."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"{name}: example must be a torch.Tensor, got {type(example).__name__}")
    if example.device.type not in backends.DEVICES["cuda"]:
        raise ValueError(f"{name}: example must be on a CUDA device, got {example.device}")
    if model.training:
        raise ValueError(f"{name}: model is in training mode; call eval() first")


class Graph:
    """A captured inference; made by `effkernels.graph`.

    It reads parameters and buffers where they lay when it was captured: what is changed in place counts at the next
    call, a tensor that replaces another does not.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model = model  # whose parameters the graph reads
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device_of(example):
            self._input = torch.empty_like(example).copy_(example)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    model(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._output = model(self._input)

    def __call__(self, x: Tensor) -> Tensor:
        """
        Raises:
            ValueError: x differs from the example in shape, dtype or device.
        """
        for trait in ("shape", "dtype", "device"):
            given, captured = getattr(x, trait), getattr(self._input, trait)
            if given != captured:
                raise ValueError(f"graph: x must have the {trait} of the example, {captured}, got {given}")
        with torch.cuda.device_of(x):
            self._input.copy_(x)
            self._graph.replay()
            output: Tensor = tree_map_only(Tensor, Tensor.clone, self._output)
            return output
