"""Run by torchrun: networks with synchronised BatchNorm, each process with a batch of its own size, against one process
with all the images; and networks under DistributedDataParallel and FSDP2."""

import copy
import faulthandler
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
import zoo
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import effkernels
from effkernels.nn import ConvBNAct, DepthwiseConvBNAct, FusedMBConv, MBConv
from effkernels.ops._cases import assert_close_to_reference
from effkernels.ops.batch_norm import synchronised

SYNCHRONISED = nn.SyncBatchNorm.convert_sync_batchnorm


def network() -> nn.Module:
    return nn.Sequential(
        ConvBNAct(3, 8, kernel_size=3, stride=2),
        MBConv(8, 8, expand_ratio=1),
        MBConv(8, 12, kernel_size=5, stride=2),
        MBConv(12, 12),
        FusedMBConv(12, 12),
        DepthwiseConvBNAct(12),
    )


def outcome(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, input gradient, parameter gradients, statistics."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def joined(outcome: list[Tensor], sizes: list[int], parameters: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """What processes with `sizes` images each have together: their maps, and the sums of their parameter gradients."""
    for i in range(2):
        everyones = [outcome[i].new_empty(size, *outcome[i].shape[1:]) for size in sizes]
        everyones[dist.get_rank(group)] = outcome[i]
        for rank, t in enumerate(everyones):
            dist.broadcast(t, group=group, group_src=rank)
        outcome[i] = torch.cat(everyones)
    for t in outcome[2 : 2 + parameters]:
        dist.all_reduce(t, group=group)
    return outcome


def check(
    name: str,
    plain: nn.Module,
    convert: Callable[[nn.Module], nn.Module],
    sizes: list[int],
    group: dist.ProcessGroup | None = None,
    offset: float = 0.0,
) -> None:
    """`plain` converted, in a group of processes with `sizes` images each, against `plain` with all of them."""
    numbers = torch.Generator().manual_seed(1)
    images = offset + torch.randn(sum(sizes), 3, 16, 16, generator=numbers)
    with effkernels.use_backend("eager"):
        grad = torch.randn(copy.deepcopy(plain)(images).shape, generator=numbers)
        eager = outcome(copy.deepcopy(plain), images, grad)
        exact = outcome(copy.deepcopy(plain).double(), images.double(), grad.double())
    mine = [t.split(sizes)[dist.get_rank(group)] for t in (images, grad)]
    parameters = len(list(plain.parameters()))
    narrow, wide = (
        joined(outcome(convert(copy.deepcopy(plain).to(dtype)), *(t.to(dtype) for t in mine)), sizes, parameters, group)
        for dtype in (torch.float32, torch.float64)
    )
    for got, expected in zip(wide, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda message: f"{name}: {message}")
    for kind in (slice(0, 1), slice(1, 2), slice(2, 2 + parameters), slice(2 + parameters, None)):
        vectors = (torch.cat([t.flatten() for t in tensors[kind]]) for tensors in (narrow, eager, exact))
        assert_close_to_reference(*vectors)


def check_traffic() -> None:
    """One exchange per BatchNorm forward and one backward, of a few vectors."""
    block, x = SYNCHRONISED(MBConv(8, 8)), torch.randn(2, 8, 6, 6)
    with mock.patch.object(synchronised, "_sum", wraps=synchronised._sum) as exchange:
        y = block(x)
        assert [tuple(call.args[0].shape) for call in exchange.call_args_list] == [(3, 48), (3, 48), (3, 8)]
        exchange.reset_mock()
        y.sum().backward()
        assert [tuple(call.args[0].shape) for call in exchange.call_args_list] == [(2, 8), (2, 48), (2, 48)]


def check_wrapped() -> None:
    """Gradients under DistributedDataParallel and FSDP2 are the means of those of the processes."""
    plain = nn.Sequential(ConvBNAct(3, 8, stride=2), MBConv(8, 8), FusedMBConv(8, 8))
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*sharded, sharded):
        fully_shard(module, mesh=mesh)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for model in (plain, wrapped, sharded):
        with effkernels.use_backend("eager" if model is plain else "auto"):
            model(x).sin().sum().backward()
    for expected, in_wrapped, in_sharded in zip(*(m.parameters() for m in (plain, wrapped, sharded)), strict=True):
        dist.all_reduce(expected.grad)
        for got in (in_wrapped.grad, in_sharded.grad.full_tensor()):
            torch.testing.assert_close(got, expected.grad / dist.get_world_size(), rtol=1e-4, atol=1e-4)


def main() -> None:
    faulthandler.dump_traceback_later(100, exit=True)  # where it hangs, if it does
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world, rank = dist.get_world_size(), dist.get_rank()
    unequal = list(range(1, world + 1))

    plain = network()
    for sizes in ([2] * world, unequal, [0, *unequal[1:]]):
        check(f"batches of {sizes}", plain, SYNCHRONISED, sizes)
    check("inputs far from zero", plain, SYNCHRONISED, unequal, offset=30.0)
    pair = [dist.new_group([first, first + 1]) for first in range(0, world, 2)][rank // 2]
    check("a group of two", plain, partial(SYNCHRONISED, process_group=pair), [1, 3], pair)

    check_traffic()
    check_wrapped()
    if world == 2:
        for library, build in zoo.BLOCKS.items():
            block, channels = build()
            block.drop_path = block.stochastic_depth = nn.Identity()
            plain = nn.Sequential(nn.Conv2d(3, channels, 1), block)
            synchronise = SYNCHRONISED if library == "torchvision" else convert_sync_batchnorm
            check(f"{library}, converted first", plain, lambda m: synchronise(effkernels.convert(m)), unequal)  # noqa: B023
            check(f"{library}, converted last", plain, lambda m: effkernels.convert(synchronise(m)), unequal)  # noqa: B023
        compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
        plain = nn.Sequential(ConvBNAct(3, 8, stride=2), MBConv(8, 8))
        check("compiled", plain, lambda m: compiled(SYNCHRONISED(m)), unequal)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
