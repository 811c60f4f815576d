"""`effkernels.freeze`: the same answers, and a clear error where they would no longer be."""

import copy
import io

import pytest
import torch
from torch import nn

import effkernels
from effkernels import MBConv, _native, backends, explain

pytestmark = pytest.mark.skipif(_native.MISSING["cpp"] is not None, reason=f"cpp: {_native.MISSING['cpp']}")


def network():
    model = nn.Sequential(
        MBConv(16, 16, drop_path=0.2), MBConv(16, 24, stride=2, se_ratio=0), nn.Conv2d(24, 8, 1)
    ).eval()
    return model.requires_grad_(False), torch.randn(2, 16, 12, 12)


def test_the_same_answers_without_looking_at_the_parts():
    model, x = network()
    expected = model(x)
    assert effkernels.freeze(model) is model
    assert torch.equal(model(x), expected)
    assert [d.op for d in explain(model, x).decisions] == ["MBConv, frozen"] * 2
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert model.state_dict().keys() == network()[0].state_dict().keys()


def test_unfreeze_revert_and_pickling():
    model, x = network()
    expected = effkernels.freeze(model)(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded, unfrozen = torch.load(buffer, weights_only=False), effkernels.unfreeze(copy.deepcopy(model))
    for thawed in (loaded, unfrozen, effkernels.revert(model)):
        assert "MBConv, frozen" not in [d.op for d in explain(thawed, x).decisions]
        assert torch.equal(thawed(x), expected)


def test_what_would_be_wrong_raises():
    model, x = network()
    effkernels.freeze(model)
    with pytest.raises(RuntimeError, match=r"a frozen MBConv is in training mode; call effkernels.unfreeze"):
        model.train()(x)
    model.eval()
    with pytest.raises(RuntimeError, match="no gradient"):
        model(x.clone().requires_grad_())
    with backends.use_backend("eager"), pytest.raises(RuntimeError, match="on backend 'cpp' only: use_backend asked"):
        model(x)
    with pytest.raises(ValueError, match=r"float64|dtype"):
        model(x.double())
    model[0].load_state_dict(MBConv(16, 16).state_dict())
    with pytest.raises(RuntimeError, match="has other weights than when it was frozen"):
        model(x)
    expected = effkernels.unfreeze(model)(x)
    assert torch.equal(effkernels.freeze(model)(x), expected)


def test_what_cannot_be_frozen():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
        effkernels.freeze("b0")
    with pytest.raises(ValueError, match="Linear has nothing to freeze"):
        effkernels.freeze(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="0 uses batch statistics"):
        effkernels.freeze(network()[0].train())
    with pytest.raises(ValueError, match=r"0 must be on the CPU, got meta; effkernels.graph is for a GPU"):
        effkernels.freeze(network()[0].to("meta"))


def test_compile_and_export():
    model, x = network()
    expected = effkernels.freeze(model)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(model, (x,))
    assert [node.target for node in exported.graph.nodes].count(torch.ops.effkernels.mbconv_packed.cpp) == 2
    torch.testing.assert_close(exported.module()(x), expected)
