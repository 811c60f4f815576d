"""effkernels.explain."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import effkernels
from effkernels import backends
from effkernels.nn import MBConv


def test_a_block(kernels):
    module = MBConv(16, 16)
    state = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.randn(2, 16, 8, 8)
    explanation = effkernels.explain(module, x)
    assert [d.op for d in explanation.decisions] == ["MBConv", "mbconv"]
    assert {d.backend for d in explanation.decisions} == {kernels}
    assert f"mbconv  2x16x8x8  float32  {x.device}  {kernels}" in str(explanation)
    assert f"not {'cpp' if x.is_cuda else 'cuda'}: " in str(explanation)
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())


def test_equal_calls_share_a_line(backend):
    explanation = effkernels.explain(torch.nn.Sequential(MBConv(16, 16), MBConv(16, 16)), torch.randn(2, 16, 8, 8))
    (line,) = (line for line in str(explanation).splitlines() if line.startswith("MBConv"))
    assert line.endswith("2 times")


def test_an_altered_block_says_why(kernels):
    module = MBConv(16, 16)
    module.depthwise.conv.register_forward_hook(lambda *args: None)
    text = str(effkernels.explain(module, torch.randn(2, 16, 8, 8)))
    assert f"not {kernels}: Conv2d has hooks" in text


def test_an_op(backend):
    x, weights = torch.randn(2, 8, 4, 4), (torch.randn(2, 8), torch.randn(2), torch.randn(8, 2), torch.randn(8))
    explanation = effkernels.explain(effkernels.ops.squeeze_excite, x, *weights, gate="hardsigmoid")
    assert [(d.op, d.backend) for d in explanation.decisions] == [("squeeze_excite", backend)]


def test_the_random_state_is_restored():
    module, x = MBConv(16, 16, drop_path=0.5), torch.randn(4, 16, 8, 8)
    before = torch.get_rng_state()
    effkernels.explain(module, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_of_effkernels():
    assert str(effkernels.explain(torch.nn.ReLU(), torch.randn(2))) == "no effkernels op was called"


def test_errors_come_through():
    with pytest.raises(ValueError, match="x must be 4-dimensional"):
        effkernels.explain(effkernels.ops.bn_act, torch.randn(2, 3), None, None, None, None)


def test_auto_leaves_training_on_a_gpu_to_pytorch(monkeypatch):
    """Until a measurement says that it is faster; what is asked for by name runs."""
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    assert "slower than PyTorch's" in backends.trains_slower(x)
    assert backends.trains_slower(torch.empty(1)) is None
    with effkernels.use_backend("cuda"):
        assert backends.trains_slower(x) is None

    monkeypatch.setattr(backends, "trains_slower", lambda x: "slower")
    block, x = MBConv(8, 8), torch.randn(2, 8, 6, 6)

    def decided():
        decision = effkernels.explain(block, x).decisions[0]
        return decision.backend, set(decision.rejected.values())

    assert decided() == ("eager", {"slower"})
    with torch.no_grad():
        assert decided()[0] != "eager"
    block.eval()
    assert decided()[0] != "eager"
