"""What a workload launches, its bytes and its operations, against figures worked out by hand."""

from collections import Counter

import pytest
import torch
import torchvision
from torch import nn

import effkernels
from effkernels.models import multiply_adds
from effkernels.profiling import GPU_BACKEND, GPUS, Ceilings, Launch, Workload, as_on_gpu, count_bytes, on_meta, record
from effkernels.profiling.launches import Touch
from effkernels.profiling.workload import BACKWARD, FORWARD

CPP = pytest.param("cpp", marks=pytest.mark.skipif(bool(effkernels._native.MISSING["cpp"]), reason="not built"))
N, C, M, SIZE = 2, 4, 8, 6
X, E = N * C * SIZE**2 * 4, N * M * SIZE**2 * 4  # bytes of a map with C channels, and of one with M
MACS = N * SIZE**2  # multiply-adds of one weight


def layers() -> nn.Sequential:
    expand = nn.Sequential(nn.Conv2d(C, M, 1, bias=False), nn.BatchNorm2d(M), nn.SiLU())
    depthwise = nn.Conv2d(M, M, 3, padding=1, groups=M, bias=False)
    return nn.Sequential(expand, depthwise)


def figures(launches: list[Launch]) -> list[tuple[str, str, str, int, int]]:
    return [(a.op, a.kind, a.block, a.bytes, a.flops.total) for a in launches]


def test_a_training_step_is_counted_op_by_op():
    model, x = layers(), torch.randn(N, C, SIZE, SIZE)
    launches, _ = record(Workload(model, x, train=True), ["0", "1"])
    vector, weight, window = 4 * M, 4 * C * M, 4 * M * 9
    forward = [launch for launch in launches if launch.phase == FORWARD and launch.block]
    assert figures(forward) == [
        ("aten::convolution", "1x1 convolution", "0", X + weight + E, 2 * MACS * C * M),
        ("aten::add_", "elementwise", "0", 16, 0),  # num_batches_tracked
        # Twice read, once written; four vectors read and two written.
        ("aten::native_batch_norm", "batch norm", "0", 3 * E + 6 * vector, 0),
        ("aten::silu", "activation", "0", 2 * E, 0),
        ("aten::convolution", "depthwise convolution", "1", 2 * E + window, 2 * MACS * M * 9),
    ]
    backward = [launch for launch in launches if launch.phase == BACKWARD and launch.block]
    assert figures(backward) == [
        # One kernel reads the gradient and the weight, the other the gradient and the input.
        ("aten::convolution_backward", "depthwise convolution", "1", 4 * E + 2 * window, 2 * 2 * MACS * M * 9),
        ("aten::silu_backward", "activation", "0", 3 * E, 0),
        ("aten::native_batch_norm_backward", "batch norm", "0", 5 * E + 7 * vector, 0),
        ("aten::convolution_backward", "1x1 convolution", "0", E + X + weight, 2 * MACS * C * M),  # of the weight alone
    ]
    assert [launch.kernels for launch in backward] == [2, 1, 2, 1]
    assert all(launch.milliseconds > 0 for launch in launches)


def test_the_meta_device_is_counted_alike():
    model, x = layers(), torch.randn(N, C, SIZE, SIZE)
    real, peak = record(Workload(model, x, train=True), ["0", "1"])
    meta, meta_peak = record(on_meta(model, x.shape, x.dtype, train=True), ["0", "1"])
    assert figures(real) == figures(meta)
    assert peak == meta_peak
    assert not any(launch.milliseconds for launch in meta)


def test_views_cost_nothing_and_updates_in_place_a_read_and_a_write():
    x = torch.zeros(1000)
    assert count_bytes(lambda: x.view(10, 100).t()) == 0
    assert count_bytes(lambda: x.add_(1)) == 2 * x.nbytes
    assert count_bytes(lambda: x.copy_(x + 1)) == 4 * x.nbytes
    assert count_bytes(lambda: x[:1].expand(1000) + x) == 2 * x.nbytes + 4
    assert count_bytes(lambda: torch.empty_like(x)) == count_bytes(lambda: x.new_empty(9)) == 0


def test_lists_altered_in_place_are_read_and_written():
    tensors = [torch.zeros(1000), torch.zeros(10)]
    assert count_bytes(lambda: torch._foreach_add_(tensors, 1)) == 2 * 1010 * 4


def test_the_peak_is_of_the_tensors_that_live_at_once():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(5):
                x = x + 1
            return x

    x = torch.zeros(1000)
    assert record(Workload(Chain(), x)).peak_bytes == 3 * x.nbytes  # the input, one sum and the next


@pytest.mark.parametrize("backend", ["eager", CPP])
@pytest.mark.parametrize("train", [False, True])
def test_bytes_of_an_mbconv_are_its_passes(backend, train):
    """Passes over the narrow maps at the block's ends, and over the wide ones before and after its convolution."""
    block = torchvision.models.efficientnet_b0(stochastic_depth_prob=0.0).features[2][1]
    x = torch.randn(2, 24, 64, 64, requires_grad=train)
    effkernels.convert(block)
    launches, _ = record(Workload(nn.Sequential(block), x, train, backend), ["0"])
    passes = {
        ("eager", False): (7, 6 + 9),
        ("cpp", False): (3, 2),
        # Eager clones what an activation overwrites, for the gradient.
        ("eager", True): (20, (19 + 2) + (32 + 2)),
        ("cpp", True): (14, 6 + 7),
    }[backend, train]
    maps = passes[0] * x.nbytes + passes[1] * 6 * x.nbytes
    got = sum(launch.bytes for launch in launches if launch.block)
    assert maps <= got <= 1.03 * maps  # weights and vectors are counted too


def of_both_generations() -> nn.Module:
    return nn.Sequential(
        effkernels.FusedMBConv(3, 8, kernel_size=3, expand_ratio=4),
        effkernels.MBConv(8, 8, kernel_size=7, se_ratio=0.5),
    )


@pytest.mark.parametrize("make", [torchvision.models.efficientnet_b0, of_both_generations])
def test_operations_are_the_multiply_adds_of_the_network_whoever_runs_them(make):
    model, shape = make(), (1, 3, 64, 64)
    expected = 2 * multiply_adds(model, *shape)
    effkernels.convert(model)
    counted = {}
    with as_on_gpu():
        for backend in ("eager", "cuda", "triton"):
            launches, _ = record(on_meta(model, shape, torch.float16, backend=backend))
            counted[backend] = sum(launch.flops.total for launch in launches)
    launches, _ = record(Workload(model.eval(), torch.randn(shape)))
    counted["auto"] = sum(launch.flops.total for launch in launches)
    assert set(counted.values()) == {expected}


def test_a_block_is_three_launches_on_a_gpu_in_inference():
    model = effkernels.convert(torchvision.models.efficientnet_b0())
    blocks = [name for name, module in model.named_modules() if "MBConv" in type(module).__name__]
    assert len(blocks) == 16
    with as_on_gpu():
        launches, _ = record(on_meta(model, (4, 3, 224, 224), torch.float16, backend=GPU_BACKEND), blocks)
    ours = [launch for launch in launches if launch.block]
    assert {launch.op for launch in ours} == {"dwconv", "expand_dwconv", "se_gate", "pointwise_inference"}
    assert Counter(launch.block for launch in ours) == dict.fromkeys(blocks, 3)
    # docs/gpu_inference.md has what was counted while the launches ran; with partial sums it is a little more.
    assert 60.6e6 * 0.95 <= sum(launch.bytes for launch in ours) <= 60.6e6


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_block_trains_as_one_op_on_a_gpu(backend):
    model = effkernels.convert(nn.Sequential(torchvision.models.efficientnet_b0().features[3]))
    with as_on_gpu():
        workload = on_meta(model, (2, 24, 56, 56), torch.float16, train=True, backend=backend)
        launches, peak = record(workload, ["0.0", "0.1"])
    ops = Counter((launch.op, launch.block, launch.phase) for launch in launches)
    for block in ("0.0", "0.1"):
        assert ops["dwconv", block, FORWARD] == ops["dwconv_backward", block, BACKWARD] == 1
        # The three BatchNorms' counts of batches and running statistics.
        assert [ops[f"aten::_foreach_{name}", block, FORWARD] for name in ("add_", "mul", "lerp_")] == [1, 1, 1]
    assert peak > 0
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.skipif(bool(effkernels._native.MISSING["cpp"]), reason="not built")
def test_autocast_casts_the_weights_of_a_block_at_once():
    """And leaves their gradients as wide as they are."""
    block = effkernels.MBConv(8, 8, expand_ratio=2)
    with torch.autocast("cpu", torch.bfloat16):
        workload = Workload(nn.Sequential(block), torch.randn(2, 8, 9, 10), train=True, backend="cpp")
        launches, _ = record(workload, ["0"])
    assert [launch.phase for launch in launches if launch.op == "aten::_foreach_copy_"] == [FORWARD, BACKWARD]
    casts = [touch.shape for launch in launches if launch.op == "aten::_to_copy" for touch in launch.touches]
    weights = [layer.conv.weight for layer in (block.expand, block.depthwise, block.project)]
    assert not {w.shape for w in weights} & {*casts}
    assert all((w.grad != w.grad.bfloat16()).any() for w in weights)


def test_a_gpu_takes_the_longest_of_its_ceilings():
    touch = Touch(0, (75,), is_map=False, size=300, read=300, written=100)
    launch = Launch("op", "kind", "", FORWARD, (touch,), effkernels.ops._op.Flops(6000, 50), 2, 0.0)
    assert Ceilings(10, 1000, 1000).bound(launch) == 40  # bytes
    assert Ceilings(1000, 1000, 1000).bound(launch) == 6  # matrix products
    assert Ceilings(1000, 1e9, 5).bound(launch) == 10  # the depthwise convolution
    assert Ceilings(10, 1000, 1000, launch=0.5).seconds([launch, launch]) == 82


def test_gpus_know_their_arithmetic():
    assert GPUS["H100"].ceilings(torch.float32).matrix < GPUS["H100"].ceilings(torch.bfloat16).matrix
    with pytest.raises(ValueError, match="dtype must be one of float32, float16 on T4, got bfloat16"):
        GPUS["T4"].ceilings(torch.bfloat16)
