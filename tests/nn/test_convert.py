"""The swap of torchvision's and timm's blocks: same answers, same object, same everything else."""

import copy
import io
import operator
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import zoo
from runs import assert_outcomes_close, forward_backward, inference, three_sgd_steps, without_chance
from torch import nn
from torch.nn.utils import parametrizations, prune

import effkernels
from effkernels import backends


@pytest.fixture(scope="module", params=zoo.MODELS)
def network(request):
    """A model, images, and what the unconverted model computes from them in float32 and in float64."""
    torch.manual_seed(0)
    model = zoo.MODELS[request.param]()
    images = [torch.randn(3, 3, 64, 64) for _ in range(5 if "b0" in request.param else 3)]
    zoo.calibrated(model, torch.cat(images))
    return model, images, {}


def assert_converted_is_as_close(network, run, training):
    model, images, expected = network
    device = torch.get_default_device()
    model = without_chance(copy.deepcopy(model).train(training).to(device))
    images = [x.to(device) for x in images]
    if (run, training, device) not in expected:
        expected[run, training, device] = (
            run(copy.deepcopy(model), images),
            run(copy.deepcopy(model).double(), [x.double() for x in images]),
        )
    got = run(effkernels.convert(model), images)
    assert_outcomes_close(got, *expected[run, training, device])


def test_inference(kernels, network):
    assert_converted_is_as_close(network, inference, training=False)


@pytest.mark.parametrize("training", [True, False])
def test_forward_backward(kernels, network, training):
    assert_converted_is_as_close(network, forward_backward, training)


def test_three_sgd_steps(kernels, network):
    assert_converted_is_as_close(network, three_sgd_steps, training=True)


@pytest.mark.parametrize("training", [True, False])
def test_eager_backend_gives_the_same_bits(network, training):
    model, images, _ = network
    converted = effkernels.convert(copy.deepcopy(model)).train(training)
    model = copy.deepcopy(model).train(training)
    with effkernels.use_backend("eager"):
        for x in images[:2]:
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            assert torch.equal(converted(x), expected)


def test_every_block_is_fused(kernels, network):
    model, images, _ = network
    converted = effkernels.convert(copy.deepcopy(model)).to(torch.get_default_device())
    with torch.no_grad(), backends.record_decisions() as decisions:
        converted(images[0].to(torch.get_default_device()))
    assert {d.backend for d in decisions} == {kernels}
    report = effkernels.conversion_report(converted)
    assert len(report.fused) in (16, 18, 40, 42)  # with torchvision's stem and head
    assert not report.altered
    assert {entry.reason for entry in report.left} == {"plain PyTorch layers"}
    assert f"fused: {len(report.fused)} blocks" in str(report)


def test_object_parameters_and_keys_stay(network):
    model = copy.deepcopy(network[0])
    classes = [type(m) for m in model.modules()]
    state = {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()}
    parameters = list(map(id, model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert effkernels.convert(model) is model
    assert {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()} == state
    assert list(map(id, model.parameters())) == parameters
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == parameters
    assert all(issubclass(type(m), cls) for m, cls in zip(model.modules(), classes, strict=True))

    converted = [type(m) for m in model.modules()]
    assert converted != classes
    assert effkernels.convert(model) is model
    assert [type(m) for m in model.modules()] == converted

    assert effkernels.revert(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert effkernels.revert(model) is model


@pytest.fixture(params=zoo.BLOCKS)
def block(request):
    """An unconverted block in eval, and an input."""
    torch.manual_seed(0)
    block, channels = zoo.BLOCKS[request.param]()
    x = torch.randn(4, channels, 16, 16)
    return zoo.calibrated(block, x).eval(), x


def _pickle(block, tmp_path):
    return pickle.loads(pickle.dumps(block))


def _save(block, tmp_path):
    torch.save(block, tmp_path / "block.pt")
    return torch.load(tmp_path / "block.pt", weights_only=False)


def _deepcopy(block, tmp_path):
    return copy.deepcopy(block)


@pytest.mark.parametrize("duplicate", [_pickle, _save, _deepcopy])
def test_copies_are_converted_too(backend, block, duplicate, tmp_path):
    original, x = effkernels.convert(block[0]), block[1]
    twin = duplicate(original, tmp_path)
    assert [type(m) for m in twin.modules()] == [type(m) for m in original.modules()]
    with torch.no_grad():
        assert torch.equal(twin(x), original(x))
        for parameter in twin.parameters():
            parameter.zero_()
        assert not torch.equal(twin(x), original(x))


def test_a_saved_block_loads_in_a_fresh_process(block, tmp_path):
    torch.save(effkernels.convert(block[0]), tmp_path / "block.pt")
    program = "import sys, torch; print(type(torch.load(sys.argv[1], weights_only=False)).__module__)"
    command = [sys.executable, "-W", "ignore", "-c", program, tmp_path / "block.pt"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.strip() == type(block[0]).__module__


def test_import_leaves_the_libraries_alone():
    program = "import sys, effkernels; print(*{'torchvision', 'timm'} & set(sys.modules))"
    command = [sys.executable, "-W", "ignore", "-c", program]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""


def test_state_dict_moves_between_original_and_converted(backend, block):
    original, x = block
    converted = effkernels.convert(copy.deepcopy(original))
    buffer = io.BytesIO()
    torch.save(original.state_dict(), buffer)
    for parameter in converted.parameters():
        nn.init.normal_(parameter)
    buffer.seek(0)
    converted.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(converted(x), original(x))
    original.load_state_dict(converted.state_dict())


def test_hooks_on_the_block_itself(kernels, block):
    original, x = block
    calls = []
    original.register_forward_hook(lambda module, args, output: calls.append("before") or output + 1)
    converted = effkernels.convert(original)
    converted.register_forward_pre_hook(lambda module, args: calls.append("after"))
    with torch.no_grad(), backends.record_decisions() as decisions:
        converted(x)
    assert calls == ["after", "before"]
    assert decisions[0].backend == kernels


def test_hooks_on_every_block_keep_the_network_fused(network):
    model = effkernels.convert(copy.deepcopy(network[0]))
    fused = effkernels.conversion_report(model).fused
    for entry in fused:
        model.get_submodule(entry.name).register_forward_hook(lambda module, args, output: None)
    assert effkernels.conversion_report(model).fused == fused


def test_hooks_on_drop_path_keep_the_block_fused(kernels, block):
    original, x = block
    converted = effkernels.convert(original)
    seen = []
    drop_path = getattr(converted, "stochastic_depth", None) or converted.drop_path
    drop_path.register_forward_hook(lambda module, args, output: seen.append(output))
    with backends.record_decisions() as decisions:
        converted(x)
    assert len(seen) == 1
    assert decisions[0].backend == kernels


def test_distributed_data_parallel(kernels, block, tmp_path):
    original, x = block
    converted = effkernels.convert(copy.deepcopy(original))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(converted)
        wrapped(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    original(x).square().sum().backward()
    for got, expected in zip(converted.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-3)


class _LowRank(nn.Conv2d):
    """Like LoRA's: a convolution with a low-rank update beside its weight."""

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, 1, bias=False)
        self.weight = conv.weight
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def _find(block, predicate):
    """The last child that fits, its parent and its name."""
    *_, found = (
        (module, parent, name)
        for parent in block.modules()
        for name, module in parent.named_children()
        if predicate(module)
    )
    return found


def _depthwise(block):
    return _find(block, lambda m: isinstance(m, nn.Conv2d) and m.groups > 1)


def _projection(block):
    return _find(block, lambda m: isinstance(m, nn.Conv2d))


def _bn(block):
    return _find(block, lambda m: isinstance(m, nn.BatchNorm2d))


def _se(block):
    return _find(block, lambda m: "Squeeze" in type(m).__name__)


def forward_hook(block):
    _depthwise(block)[0].register_forward_hook(lambda module, args, output: output * 2)


def forward_pre_hook(block):
    _se(block)[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(block):
    _depthwise(block)[0].register_full_backward_hook(lambda module, grad_input, grad_output: (grad_output[0] * 2,))


def parametrisation(block):
    parametrizations.weight_norm(_projection(block)[0])


def pruning(block):
    prune.l1_unstructured(_depthwise(block)[0], "weight", 0.5)


def low_rank_update(block):
    torch.manual_seed(2)
    conv, parent, name = _projection(block)
    setattr(parent, name, _LowRank(conv))


def group_norm(block):
    bn, parent, name = _bn(block)
    setattr(parent, name, nn.GroupNorm(4, bn.num_features))


def no_squeeze_excite(block):
    _, parent, name = _se(block)
    setattr(parent, name, nn.Tanh())


def dilation(block):
    conv = _depthwise(block)[0]
    conv.dilation, conv.padding = (2, 2), (2, 2)


def reflection(block):
    _depthwise(block)[0].padding_mode = "reflect"
    _depthwise(block)[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def own_forward(block):
    conv = _projection(block)[0]
    conv.forward = lambda x: F.conv2d(x, conv.weight * 2)


REASONS = {
    forward_hook: "Conv2d has hooks",
    forward_pre_hook: "has hooks",
    backward_hook: "Conv2d has hooks",
    parametrisation: "ParametrizedConv2d takes the place of a Conv2d",
    pruning: "Conv2d has hooks",
    low_rank_update: "_LowRank takes the place of a Conv2d",
    group_norm: "GroupNorm takes the place of a BatchNorm",
    no_squeeze_excite: "Tanh takes the place of a Squeeze",
    dilation: "Conv2d has dilation (2, 2)",
    reflection: "Conv2d has padding mode 'reflect'",
    own_forward: "Conv2d has a forward method of its own",
}


@pytest.mark.parametrize("first", ["alter", "convert"])
@pytest.mark.parametrize("alter", REASONS, ids=operator.attrgetter("__name__"))
def test_an_altered_block_runs_as_its_own_forward_says(kernels, block, alter, first):
    original, x = block
    converted = copy.deepcopy(original)
    alter(original)
    for step in (alter, effkernels.convert) if first == "alter" else (effkernels.convert, alter):
        step(converted)
    results = []
    for module in (original, converted):
        images = x.clone().requires_grad_()
        y = module(images)
        y.square().sum().backward()
        results += [(y, images.grad)]
    (y, grad), (expected_y, expected_grad) = results
    assert torch.allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-4)

    (entry,) = effkernels.conversion_report(converted).altered
    assert REASONS[alter] in entry.reason
    assert REASONS[alter] in str(effkernels.conversion_report(converted))


def test_a_removed_hook_fuses_again(kernels, block):
    converted, x = effkernels.convert(block[0]), block[1]
    handle = _depthwise(converted)[0].register_forward_hook(lambda *args: None)
    assert effkernels.conversion_report(converted).altered
    handle.remove()
    with backends.record_decisions() as decisions:
        converted(x)
    assert decisions[0].backend == kernels
    assert effkernels.conversion_report(converted).fused


def test_global_hooks_see_every_module(kernels, block):
    converted, x = effkernels.convert(block[0]), block[1]
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        converted(x)
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 5


def test_a_block_with_a_forward_of_its_own(kernels, block):
    converted, x = effkernels.convert(block[0]), block[1]
    converted.forward = lambda x: x + 1
    assert torch.equal(converted(x), x + 1)
    assert effkernels.conversion_report(converted).altered[0].reason == "it has a forward method of its own"


def test_a_subclass_is_left_alone():
    efficientnet = zoo.torchvision().models.efficientnet

    class Doubled(efficientnet.MBConv):
        def forward(self, x):
            return 2 * super().forward(x)

    model = zoo.torchvision().models.efficientnet_b0().features[:3]
    model[2][1].__class__ = Doubled
    effkernels.convert(model)
    assert type(model[2][1]) is Doubled
    (entry,) = (entry for entry in effkernels.conversion_report(model).left if entry.name == "2.1")
    assert entry.reason == "a subclass of MBConv, which may compute something else"
    model[2][1].block = nn.Identity()  # its layers could be converted
    with pytest.raises(ValueError, match=r"nothing to convert: .* a subclass of MBConv"):
        effkernels.convert(model[2][1:])


@pytest.mark.parametrize("name", ["efficientnet_cc_b0_4e", "mixnet_s", "mobilenetv3_small_050", "tf_efficientnet_b0"])
def test_other_models_of_timm(backend, name):
    model = zoo.timm().create_model(name)
    x = torch.randn(2, 3, 65, 65)
    model = zoo.calibrated(model, x).eval()
    expected = model(x)
    torch.testing.assert_close(effkernels.convert(model)(x), expected, rtol=1e-3, atol=1e-3)


def test_squeeze_excite_of_other_torchvision_models(kernels):
    model = zoo.torchvision().models.mobilenet_v3_small()
    x = torch.randn(2, 3, 64, 64)
    model = zoo.calibrated(model, x).eval()
    expected = model(x)
    torch.testing.assert_close(effkernels.convert(model)(x), expected, rtol=1e-3, atol=1e-3)
    assert {entry.type for entry in effkernels.conversion_report(model).fused} == {
        "Conv2dNormActivation",
        "SqueezeExcitation",
    }


def test_minimal_memory(kernels, block):
    original, x = block
    converted = effkernels.convert(copy.deepcopy(original), memory="minimal").train()
    assert copy.deepcopy(effkernels.convert(converted)).memory == "minimal"
    assert_outcomes_close(
        forward_backward(converted, [x]),
        forward_backward(copy.deepcopy(original).train(), [x]),
        forward_backward(copy.deepcopy(original).train().double(), [x.double()]),
    )
    assert not hasattr(effkernels.revert(converted), "memory")
    with pytest.raises(ValueError, match="convert: memory must be one of default, minimal, got 'less'"):
        effkernels.convert(original, memory="less")


def test_nothing_to_convert():
    with pytest.raises(ValueError, match="Sequential has nothing to convert: no MBConv"):
        effkernels.convert(nn.Sequential(nn.Conv2d(3, 8, 3)))
    for function in (effkernels.convert, effkernels.revert, effkernels.conversion_report):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
            function({})


def test_not_converted_yet(block):
    (entry,) = effkernels.conversion_report(block[0]).left
    assert entry.reason == "not converted yet"
    assert str(entry).startswith("the model (")


@pytest.mark.parametrize("training", [True, False])
def test_autocast_keeps_the_dtype(backend, block, training):
    original, x = block
    converted = effkernels.convert(copy.deepcopy(original)).train(training)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        torch.manual_seed(0)
        expected = original.train(training)(x)
        torch.manual_seed(0)
        got = converted(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.1)


def test_torch_compile_with_a_dynamic_batch(kernels, block):
    converted = effkernels.convert(block[0])
    torch._dynamo.reset()
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for n in (2, 3, 5, 7):
            x = torch.randn(n, *block[1].shape[1:])
            torch.testing.assert_close(compiled(x), converted(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs <= 2


def test_torch_export(block):
    converted, x = effkernels.convert(block[0]), block[1]
    with effkernels.use_backend("eager"):
        exported = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
        expected = converted(x)
    torch.testing.assert_close(exported.module()(x[:3]), expected[:3])


def test_fx_traces_the_original_composition(block):
    converted, x = effkernels.convert(block[0]), block[1]
    traced = torch.fx.symbolic_trace(converted)
    with effkernels.use_backend("eager"):
        torch.testing.assert_close(traced(x), converted(x))
