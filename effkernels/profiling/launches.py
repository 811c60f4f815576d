"""What a workload launches: every op with the bytes that it moves and its operations, counted from shapes."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from effkernels.ops._op import COMPOSITIONS, OPS, Access, Flops, size
from effkernels.profiling._hooks import around_blocks
from effkernels.profiling.timing import milliseconds, stamp
from effkernels.profiling.workload import BACKWARD, FORWARD, Workload

aten = torch.ops.aten

# The kinds of PyTorch's ops; each of ours is a kind of its own, by its name.
POINTWISE, DEPTHWISE, DENSE = "1x1 convolution", "depthwise convolution", "other convolution, linear"
NORM, ACTIVATION, SQUEEZE = "batch norm", "activation", "pooling, squeeze-excite"
ELEMENTWISE, OTHER = "elementwise", "other"
KINDS = (POINTWISE, DEPTHWISE, DENSE, NORM, ACTIVATION, SQUEEZE, ELEMENTWISE, OTHER)


class Touch(NamedTuple):
    """The bytes of one tensor that an op reads and writes."""

    memory: int  # tensors with the same number share their memory
    shape: tuple[int, ...]
    is_map: bool  # [N, C, H, W], not a weight, nor one value per channel
    size: int
    read: int
    written: int


@dataclass(frozen=True)
class Launch:
    """One op of a run. A fusion counts as its phases."""

    op: str  # such as aten::silu_
    kind: str
    block: str  # "" outside all blocks
    phase: str
    touches: tuple[Touch, ...]
    flops: Flops
    kernels: int
    milliseconds: float  # 0 on the meta device

    @property
    def bytes(self) -> int:
        return sum(t.read + t.written for t in self.touches)


class Recorder(TorchDispatchMode):
    """Records what runs under it.

    Our ops say what they read and write. Every other reads each tensor that it is given, and writes each that it
    returns or alters, once, but for those of `_times_read`: that is how elementwise, normalising and convolving
    kernels work where tensors exceed the caches. Copies inside a library's kernel and rows that a window reads again
    are not seen.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._weights = {t.shape for t in weights}
        self.launches: list[Launch] = []
        self.phase = FORWARD
        self.peak_bytes = 0  # of the tensors that were alive at once
        self._block = ""
        self._marks: list[Any] = []
        # Which nodes of the autograd graph are a block's: those with these sequence numbers.
        self._nodes: list[tuple[int, int, str]] = []
        # By address. An address is not given out again while there is a weak reference.
        self._memory: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._seen = 0

    def enter(self, block: str, _: Any = None) -> None:
        self._block, self._first_node = block, torch._C._autograd._get_sequence_nr()

    def leave(self, block: str, _: Any = None) -> None:
        self._block = ""
        self._nodes.append((self._first_node, torch._C._autograd._get_sequence_nr(), block))

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITIONS:
            with self:
                return COMPOSITIONS[func](*args, **kwargs)
        device = next((t.device for t in _tensors((args, kwargs))), torch.device("meta"))
        start = stamp(device)
        result = func(*args, **kwargs)
        end = stamp(device)
        outputs = result if func._schema.returns else args[:1]  # a list altered in place
        if _runs_nothing(func, (args, kwargs), outputs):
            return result
        if func in OPS:
            name, flops = OPS[func].name, OPS[func].flops(*args)
            accesses, kernels, kind = [*OPS[func].accesses(args, result).values()], 1, OPS[func].name
        else:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            name, flops, kind = func._schema.name, _flops(func, given, outputs), _kind(func, given, outputs)
            times = _times_read(func, given)
            accesses, kernels = [*_accesses(func, given, times, outputs)], max([1, *times.values()])
        touches = tuple(self._touch(*access) for access in accesses)
        self.launches.append(Launch(name, kind, self._block_now(), self.phase, touches, flops, kernels, 0.0))
        self._marks.append((start, end))
        self._memory = {address: known for address, known in self._memory.items() if not known[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(nbytes for _, _, nbytes in self._memory.values()))
        return result

    def _block_now(self) -> str:
        node = torch._C._current_autograd_node() if self.phase == BACKWARD else None
        if node is not None:
            number = node._sequence_nr()
            self._block = next((name for first, end, name in self._nodes if first <= number < end), "")
        return self._block

    def _touch(self, tensor: Tensor, read: int, written: int) -> Touch:
        shape = tensor.shape
        is_map = len(shape) == 4 and shape[2:] != (1, 1) and shape not in self._weights
        return Touch(self._number(tensor), tuple(shape), is_map, tensor.numel() * tensor.itemsize, read, written)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = StorageWeakRef(storage), self._seen, storage.nbytes()
            self._seen += 1
        return self._memory[storage._cdata][1]

    def timed(self) -> list[Launch]:
        """The launches with their times, once all have ended."""
        times = (0.0 if start is None else milliseconds(start, end) for start, end in self._marks)
        return [replace(launch, milliseconds=ms) for launch, ms in zip(self.launches, times, strict=True)]


class Recording(NamedTuple):
    launches: list[Launch]
    peak_bytes: int


def record(workload: Workload, blocks: Sequence[str] = ()) -> Recording:
    """What one run launches, and of which of the submodules named `blocks`; and the most bytes of tensors at once."""
    recorder = Recorder(workload.model.parameters())

    def turn() -> None:
        recorder.phase = BACKWARD

    with around_blocks(workload.model, blocks, recorder.enter, recorder.leave), recorder:
        workload.run(turn)
    if workload.x.is_cuda:
        torch.cuda.synchronize()
    return Recording(recorder.timed(), recorder.peak_bytes)


def count_bytes(function: Callable[..., Any], *args: Any) -> int:
    """The bytes that the ops of `function(*args)` read and write, weights included, without gradients."""
    with torch.no_grad(), Recorder() as recorder:
        function(*args)
    return sum(launch.bytes for launch in recorder.launches)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _runs_nothing(func: Any, given: Any, result: Any) -> bool:
    """Whether a call only looks at memory, or asks for some."""
    outputs = _tensors(result)
    if func.is_view or "empty" in func.__name__ or not outputs:
        return True
    memory = {t.untyped_storage()._cdata for t in _tensors(given)}
    return not func._schema.is_mutable and all(t.untyped_storage()._cdata in memory for t in outputs)


# Of what is made anew, or overwritten, nothing is read.
_OVERWRITE = {aten.copy_, aten._foreach_copy_, aten.fill_, aten.zero_, aten.bernoulli_}
_LIKE = re.compile("new_|.*_like$")


def _accesses(func: Any, given: dict[str, Any], times: dict[str, int], result: Any) -> Iterator[Access]:
    for name, value in given.items():
        if name != "self" or not (func.overloadpacket in _OVERWRITE or _LIKE.match(func.overloadpacket.__name__)):
            for tensor in _tensors(value):
                yield Access(tensor, read=size(tensor) * times.get(name, 1))
    for tensor in _tensors(result):
        yield Access(tensor, written=size(tensor))


_CONVOLUTIONS = {aten.convolution, aten.cudnn_convolution, aten.mkldnn_convolution}
_NORMS_FORWARD = {aten.native_batch_norm, aten.cudnn_batch_norm, aten._native_batch_norm_legit}
_NORMS_BACKWARD = {aten.native_batch_norm_backward, aten.cudnn_batch_norm_backward}
_ACTIVATIONS = ("silu", "sigmoid", "relu", "hardswish", "hardsigmoid", "hardtanh", "gelu", "leaky_relu", "clamp")


def _times_read(func: Any, given: dict[str, Any]) -> dict[str, int]:
    """How often arguments are read that are not read once, each time by a kernel of its own.

    Batch statistics, or BatchNorm's sums in backward, are taken before they are applied. Each gradient of a convolution
    is computed alone.
    """
    packet = func.overloadpacket
    if packet in _NORMS_FORWARD and given["training"]:
        return {"input": 2}
    if packet in _NORMS_BACKWARD and given.get("train", True):
        return {"input": 2, "grad_out": 2, "grad_output": 2}
    if packet is aten.convolution_backward:
        of_input, of_weight, of_bias = given["output_mask"]
        return {"grad_output": of_input + of_weight + of_bias, "input": int(of_weight), "weight": int(of_input)}
    return {}


def _flops(func: Any, given: dict[str, Any], result: Any) -> Flops:
    packet = func.overloadpacket
    if packet in _CONVOLUTIONS and not given.get("transposed"):
        return _of_convolution(given["weight"], result, 1)
    if packet is aten.convolution_backward and not given["transposed"]:
        # The registry counts those of groups too often.
        return _of_convolution(given["weight"], given["grad_output"], sum(given["output_mask"][:2]))
    count = flop_registry.get(packet)
    return Flops() if count is None else Flops(count(*given.values(), out_val=result))


def _of_convolution(weight: Tensor, y: Tensor, times: int) -> Flops:
    flops = 2 * times * y.numel() * weight[0].numel()
    return Flops(depthwise=flops) if weight.shape[1] == 1 else Flops(flops)


def _kind(func: Any, given: dict[str, Any], result: Any) -> str:
    packet, maps = func.overloadpacket, [t for t in _tensors((given, result)) if t.dim() == 4]
    name = func.__name__.partition(".")[0]
    if packet in _CONVOLUTIONS or packet is aten.convolution_backward:
        weight = given["weight"]
        if _pixels(given["input"]) == 1:
            return SQUEEZE
        if weight.shape[1] == 1:
            return DEPTHWISE
        return POINTWISE if weight[0, 0].numel() == 1 else DENSE
    if packet in flop_registry:
        return DENSE
    if packet in _NORMS_FORWARD | _NORMS_BACKWARD:
        return NORM
    if (maps and any(_pixels(t) == 1 and t.shape[1] > 1 for t in maps)) or "pool" in name or name == "mean":
        return SQUEEZE  # also where a gate or a mean meets the map
    if name.removesuffix("_").removesuffix("_backward") in _ACTIVATIONS:
        return ACTIVATION
    return ELEMENTWISE if torch.Tag.pointwise in func.tags or name.startswith("_foreach") else OTHER


def _pixels(t: Tensor) -> int:
    return t[0, 0].numel()
