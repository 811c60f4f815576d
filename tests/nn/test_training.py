"""How blocks are trained: mixed precision, checkpoints, accumulated gradients, shared blocks, frozen parts, graphs."""

import copy

import pytest
import torch
from runs import assert_outcomes_close, without_chance
from torch import nn
from torch.utils.checkpoint import checkpoint

import effkernels
from effkernels import backends
from effkernels.nn import FusedMBConv, MBConv
from effkernels.ops._op import Op


def network():
    return without_chance(
        nn.Sequential(
            MBConv(8, 16, stride=2),
            MBConv(16, 16, kernel_size=5, drop_path=0.5),
            FusedMBConv(16, 16, drop_path=0.5),
        )
    )


def images(n=4, size=(12, 10)):
    return torch.randn(n, 8, *size)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(kernels, dtype):
    """Scaled gradients are unscaled, a step with an overflow is skipped, and training goes on."""
    model, x = network(), images()
    outcomes = {}
    for backend, wide in ((kernels, False), ("eager", False), ("eager", True)):
        twin = copy.deepcopy(model).to(torch.float64 if wide else torch.float32)
        optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**6, growth_interval=100)
        torch.manual_seed(0)
        with effkernels.use_backend(backend), torch.autocast(torch.get_default_device().type, dtype, enabled=not wide):
            loss = twin(x.double() if wide else x).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        outcomes[backend, wide] = {"gradients": gradients(twin)}
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**6
        if backend == kernels:
            before = [p.clone() for p in twin.parameters()]
            next(twin.parameters()).grad[0] = torch.inf
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 2.0**5
            assert all(map(torch.equal, twin.parameters(), before))
    assert_outcomes_close(*outcomes.values())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints(kernels, use_reentrant):
    """The same gradients to the bit from activations computed again, which update running statistics again."""
    model, x = network(), images().requires_grad_()
    plain, kept = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(1)
    expected = plain(x)
    expected.sin().sum().backward()
    expected_grad, x.grad = x.grad, None
    torch.manual_seed(1)
    y = x
    for block in kept:
        y = checkpoint(block, y, use_reentrant=use_reentrant)
    y.sin().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, expected_grad)
    assert all(map(torch.equal, gradients(kept), gradients(plain)))
    assert {b.item() for name, b in kept.named_buffers() if "num_batches" in name} == {2}


def test_gradients_accumulate(kernels):
    model, parts = network().eval().requires_grad_(), images().split(2)
    single = []
    for x in parts:
        model.zero_grad()
        model(x).sin().sum().backward()
        single.append(gradients(model))
    model.zero_grad()
    for x in parts:
        model(x).sin().sum().backward()
    for got, *each in zip(gradients(model), *single, strict=True):
        assert torch.equal(got, sum(each))


@pytest.mark.parametrize("block", [MBConv, FusedMBConv])
def test_a_block_used_twice(kernels, block):
    if torch.float64 not in backends.DTYPES[kernels]:
        pytest.skip(f"{kernels} has no float64 kernels")
    module, x = block(8, 8), images().double()
    results = []
    for backend in (kernels, "eager"):
        twin = copy.deepcopy(module).double()
        with effkernels.use_backend(backend):
            y = twin(twin(x))
            y.sin().sum().backward()
        results.append([y, *gradients(twin), *twin.buffers()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


# What is computed backward for one parameter alone, in the order of the calls; and, of phases that may leave their
# input's or their weight's gradient out, which of the two.
UP_TO_GATE = ["bn_backward_sums", "pointwise_backward input", "se_gate_backward"]
ONLY = {
    "project.bn.weight": ["bn_backward_sums"],
    "project.conv.weight": ["bn_backward_sums", "pointwise_backward weight"],
    "se.reduce.bias": UP_TO_GATE,
    "depthwise.bn.bias": UP_TO_GATE,
    "depthwise.conv.weight": [*UP_TO_GATE, "dwconv_backward weight"],
    "expand.bn.weight": [*UP_TO_GATE, "dwconv_backward input"],
    "expand.conv.weight": [*UP_TO_GATE, "dwconv_backward input", "pointwise_backward weight"],
}


@pytest.mark.parametrize("name", ONLY)
def test_nothing_is_computed_for_frozen_parameters(kernels, name, monkeypatch):
    module, x = MBConv(8, 8).requires_grad_(False), images()
    parameter = module.get_parameter(name).requires_grad_()
    y = module(x)
    calls, original = [], Op.__call__

    def spy(self, backend, *args):
        needs = args[-2:] if self.name in ("pointwise_backward", "dwconv_backward") else ()
        calls.append(" ".join([self.name, *(n for n, need in zip(("input", "weight"), needs, strict=False) if need)]))
        return original(self, backend, *args)

    monkeypatch.setattr(Op, "__call__", spy)
    y.sin().sum().backward()
    assert calls == ONLY[name]
    assert [n for n, p in module.named_parameters() if p.grad is not None] == [name]
    assert parameter.grad.count_nonzero() > 0


def test_compiled_with_dynamic_batch_and_resolution(kernels):
    model = MBConv(8, 8)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (images(), images(3, (16, 9))):
        outcomes = []
        for module in (model, compiled):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.sin().sum().backward()
            outcomes.append([y, leaf.grad, *gradients(module)])
        for got, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
