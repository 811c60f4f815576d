"""The formulas of docs/algebra.md, against autograd."""

import pathlib
import re

import pytest
import torch

import effkernels

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "algebra.md"


def evaluate(given):
    """The page's Python, run from top to bottom."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile("\n".join(blocks), PAGE.name, "exec"), given)
    return given


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_formulas_give_the_gradients_of_autograd(kernel_size):
    block = effkernels.MBConv(6, 6, kernel_size=kernel_size, expand_ratio=4, se_ratio=0.5, dtype=torch.float64)
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.3 * torch.randn_like(parameter)
    x = (2 * torch.randn(3, 6, 7, 8, dtype=torch.float64) + 5).requires_grad_()
    with effkernels.use_backend("eager"):
        y = block(x)
    dy = torch.randn_like(y)
    expected = dict(zip(["x", *parameters], torch.autograd.grad(y, [x, *parameters.values()], dy), strict=True))

    names = {"gamma": "weight", "beta": "bias"}
    layers = {1: block.expand, 2: block.depthwise, 3: block.project}
    given = {
        "x": x,
        "dy": dy,
        "eps": block.expand.bn.eps,
        "stride": 1,
        "padding": kernel_size // 2,
        "w_expand": block.expand.conv.weight,
        "w_depthwise": block.depthwise.conv.weight,
        "w_squeeze": block.se.reduce.weight[:, :, 0, 0],
        "b_squeeze": block.se.reduce.bias,
        "w_excite": block.se.expand.weight[:, :, 0, 0],
        "b_excite": block.se.expand.bias,
        "w_project": block.project.conv.weight,
        **{f"{n}{i}": getattr(layer.bn, attribute) for i, layer in layers.items() for n, attribute in names.items()},
    }
    with torch.no_grad():
        found = evaluate({name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in given.items()})
    torch.testing.assert_close(found["y"], y.detach(), rtol=1e-12, atol=1e-12)
    assert found["gradients"].keys() == expected.keys()
    for name, gradient in [*found["gradients"].items(), *found["without_e"].items()]:
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-12, f"{name}: relative error {error:.1e}"
    moments = found["e"].var((0, 2, 3), unbiased=False), found["e"].mean((0, 2, 3))
    torch.testing.assert_close((found["variance_of_e"], found["mean_of_e"]), moments, rtol=1e-11, atol=1e-11)
