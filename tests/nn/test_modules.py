"""effkernels.MBConv and its siblings."""

import copy

import pytest
import torch
import torch.nn.functional as F
from runs import assert_as_close_as_eager, forward_backward, inference, without_chance
from torch import nn
from torch.nn.utils import parametrizations

import effkernels
from effkernels import backends
from effkernels.nn import ConvBNAct, DepthwiseConvBNAct, DropPath, FusedMBConv, MBConv, SqueezeExcite

MODULES = {
    "stride 2, 5x5": lambda: MBConv(16, 24, kernel_size=5, stride=2),
    "shortcut and drop path": lambda: MBConv(16, 16, drop_path=0.4),
    "no expand convolution": lambda: MBConv(16, 16, expand_ratio=1),
    "simplified block": lambda: MBConv(16, 24, expand_ratio=1, expand=True, se_channels=4, se_activation="relu"),
    "same padding": lambda: MBConv(16, 24, stride=2, padding="same"),
    "no squeeze-excite": lambda: MBConv(16, 16, se_ratio=0, kernel_size=7, activation="hardswish"),
    "fused": lambda: FusedMBConv(16, 16, drop_path=0.4),
    "fused, one convolution": lambda: FusedMBConv(16, 16, expand_ratio=1),
    "fused, with squeeze-excite": lambda: FusedMBConv(16, 24, stride=2, se_ratio=0.25, padding="same"),
    "depthwise": lambda: DepthwiseConvBNAct(16, activation="relu6", padding=0),
    "squeeze-excite": lambda: SqueezeExcite(16, 4, gate="hardsigmoid"),
    "convolution": lambda: ConvBNAct(16, 8, kernel_size=3),
}


def inputs(count=5, n=3, size=(13, 10)):
    return [torch.randn(n, 16, *size) for _ in range(count)]


def calibrated(module):
    """With running statistics and affine parameters that are not those of a fresh module."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    for x in inputs(2):
        module(x)
    return module


@pytest.fixture(params=MODULES)
def module(request):
    return without_chance(calibrated(MODULES[request.param]()))


@pytest.mark.parametrize("training", [True, False])
def test_forward_backward_is_as_exact_as_eager(kernels, module, training):
    assert_as_close_as_eager(forward_backward, module.train(training), inputs())


def test_inference_is_as_exact_as_eager(kernels, module):
    assert_as_close_as_eager(inference, module.eval(), inputs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inference_in_16_bits_is_as_exact_as_eager(kernels, dtype):
    module = calibrated(MBConv(16, 24, stride=2)).eval().to(dtype)
    assert_as_close_as_eager(inference, module, [x.to(dtype) for x in inputs()])


def test_channels_last_is_kept(backend, module):
    x = inputs(1, size=(12, 12))[0].to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert module.eval()(x).is_contiguous(memory_format=torch.channels_last)


def inference_ops(backend):
    return ["bn_act_dwconv_bn_act", "squeeze_excite"] if backend == "triton" else ["mbconv_inference"]


def test_a_block_in_inference_is_one_op(kernels):
    module, x = MBConv(16, 24).eval(), inputs(1)[0]
    with torch.no_grad(), backends.record_decisions() as decisions:
        module(x)
    assert [(d.op, d.backend) for d in decisions] == [(op, kernels) for op in ("MBConv", *inference_ops(kernels))]


def test_frozen_weights_need_no_grad_mode(kernels):
    module, x = MBConv(16, 24).eval().requires_grad_(False), inputs(1)[0]
    with backends.record_decisions() as decisions:
        module(x)
    assert [d.op for d in decisions][1:] == inference_ops(kernels)


@pytest.mark.parametrize("frozen", [("expand",), ("depthwise",), ("project",), ("expand", "depthwise")])
def test_batch_norms_frozen_one_by_one(kernels, frozen):
    module = calibrated(MBConv(16, 16))
    for name in frozen:
        module.get_submodule(name).bn.eval()
    assert_as_close_as_eager(forward_backward, module, inputs())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str)
def test_batch_norm_options(kernels, options, training):
    module = MBConv(16, 16)
    for layer in (module.expand, module.depthwise, module.project):
        layer.bn = nn.BatchNorm2d(layer.bn.num_features, **options)
    module(inputs(1)[0])
    module.train(training)
    assert_as_close_as_eager(forward_backward, module, inputs())
    assert_as_close_as_eager(inference, module, inputs())


def test_num_batches_tracked(backend):
    module = MBConv(16, 16)
    for x in inputs(3):
        module(x)
    module.eval()(inputs(1)[0])
    counts = [b for name, b in module.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [3, 3, 3]


def test_batch_statistics_of_one_value_are_refused(backend):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        MBConv(16, 16)(torch.randn(1, 16, 1, 1))


def test_empty_batch(backend):
    module = MBConv(16, 24, stride=2).eval()
    assert module(torch.randn(0, 16, 8, 8)).shape == (0, 24, 4, 4)


def test_a_changed_weight_changes_the_next_output(backend):
    module, x = MBConv(16, 16).eval(), inputs(1)[0]
    with torch.no_grad():
        before = module(x)
        for parameter in module.parameters():
            saved = parameter.clone()
            parameter.mul_(1.5).add_(0.1)
            assert not torch.equal(module(x), before)
            parameter.copy_(saved)
        assert torch.equal(module(x), before)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(backend, training):
    module, x = MBConv(16, 16).train(training), inputs(1)[0]
    eager = copy.deepcopy(module)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = module(x)
        with effkernels.use_backend("eager"):
            expected = eager(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    got.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in module.parameters())


def test_torch_compile_with_a_dynamic_batch(backend):
    module = calibrated(MBConv(16, 16))
    for training in (True, False):
        torch._dynamo.reset()
        module.train(training)
        compiled, plain = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager"), module
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for n in (2, 3, 5, 7):
            x = torch.randn(n, 16, 8, 8)
            with torch.set_grad_enabled(training):
                torch.testing.assert_close(compiled(x), plain(x))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - frames <= 2


def test_drop_path_drops_images_and_keeps_the_mean():
    drop, x = DropPath(0.25), torch.ones(4000, 2, 1, 1)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(y[:, 0], y[:, 1])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x
    assert DropPath(1.0)(x).count_nonzero() == 0


def test_same_padding_is_tensorflows():
    x = torch.randn(2, 16, 8, 9)
    layer = ConvBNAct(16, 8, kernel_size=3, stride=2, padding="same")
    expected = F.conv2d(F.pad(x, (1, 1, 0, 1)), layer.conv.weight, stride=2)
    assert torch.equal(layer.conv(x), expected)
    assert ConvBNAct(16, 8, kernel_size=2, padding="same")(x).shape == (2, 8, 8, 9)


def test_an_image_without_batch_dimension_is_squeezed_too(backend):
    se, x = SqueezeExcite(16, 4), torch.randn(2, 16, 5, 5)
    with pytest.raises(IndexError):
        se(x[0])


def _hook(block):
    block.depthwise.conv.register_forward_hook(lambda module, args, output: output * 2)


def _parametrise(block):
    parametrizations.weight_norm(block.project.conv)


def _replace(block):
    block.se = nn.Tanh()


def _activation(block):
    block.expand.act = nn.GELU()


def _geometry(block):
    block.depthwise.conv.dilation, block.depthwise.conv.padding = (2, 2), (2, 2)


@pytest.mark.parametrize("alter", [_hook, _parametrise, _replace, _activation, _geometry])
def test_an_altered_block_runs_as_its_children_say(kernels, alter):
    module, x = MBConv(16, 16).eval(), inputs(1)[0]
    alter(module)
    with torch.no_grad(), backends.record_decisions() as decisions:
        got = module(x)
        with effkernels.use_backend("eager"):
            expected = module(x)
    assert (decisions[0].op, decisions[0].backend) == ("MBConv", "eager")
    torch.testing.assert_close(got, expected)


def test_names_of_parameters():
    assert list(dict(MBConv(16, 16).named_parameters())) == [
        *("expand.conv.weight", "expand.bn.weight", "expand.bn.bias"),
        *("depthwise.conv.weight", "depthwise.bn.weight", "depthwise.bn.bias"),
        *("se.reduce.weight", "se.reduce.bias", "se.expand.weight", "se.expand.bias"),
        *("project.conv.weight", "project.bn.weight", "project.bn.bias"),
    ]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MBConv(16, 16, kernel_size=4), ValueError, r"kernel_size must be one of \(3, 5, 7\), got 4"),
        (lambda: MBConv(16, 16, stride=3), ValueError, r"stride must be one of \(1, 2\), got 3"),
        (lambda: MBConv(16, 16, activation="gelu"), ValueError, "activation must be one of silu, .* got 'gelu'"),
        (lambda: MBConv(16, 16, padding="valid"), TypeError, "padding must be an int, .* got 'valid'"),
        (lambda: MBConv(16, 16, padding=1.0), TypeError, "padding must be an int, .* got 1.0"),
        (lambda: MBConv(16, 16, expand=False), ValueError, "expand_ratio must be 1 .* got 6"),
        (lambda: MBConv(16, 16, drop_path=2), ValueError, "p must be a probability, got 2"),
        (lambda: SqueezeExcite(16, 4, gate="relu"), ValueError, "gate must be one of sigmoid, .* got 'relu'"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()
