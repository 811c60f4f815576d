"""Test cases of the phase ops: what an op is given, and how its answer is held against float64.

An op's folder lists its cases in cases.py, as `CASES`. One list serves the tests of every backend, on every emulation
of a GPU and on a real one, and `effkernels doctor --verify`.
"""

import importlib.util
import itertools
import pkgutil
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from effkernels import backends, ops
from effkernels.ops._activation import Activation
from effkernels.ops._op import Op
from effkernels.ops._precision import tf32

# Rounding errors that are always granted, in ulps. Nothing is more exact than eager PyTorch in float64: that differs
# from a kernel by the order of sums alone.
FLOOR_ULPS = 4
FLOOR_ULPS_FLOAT64 = 4096
SEEDS = 5


class Comparison(NamedTuple):
    """An output, beside the same by eager PyTorch in the dtypes of the arguments and in float64."""

    name: str
    got: Tensor
    eager: Tensor
    exact: Tensor


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of a phase op. Subclasses add its parameters; the case's name tells those that are not the default."""

    op: ClassVar[Op]
    dtype: torch.dtype = torch.float32
    # Whether float32 may be multiplied in TF32, which answers are then compared with.
    tf32: bool = False
    # "core" cases take every path of every kernel and run wherever kernels run; "instance" cases name each instance
    # of the CUDA kernels; the others run where a case takes milliseconds.
    tag: str = ""

    @abstractmethod
    def make(self) -> tuple[Any, ...]:
        """The op's arguments, on the CPU, from torch's random numbers."""

    @classmethod
    def drawn(cls, numbers: random.Random) -> "Case | None":
        """Any small case; None from an op whose listed cases are all."""
        return None

    @abstractmethod
    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        """The outputs beside the right ones for `arguments`."""

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.make()

    def check(self, backend: str, device: str = "cpu") -> tuple[Tensor, ...]:
        """Runs the op and returns its outputs. Answers are compared on the CPU, whatever the device.

        Raises:
            AssertionError: an output is wrong in value, shape, dtype or layout, or the op altered an argument.
        """
        outputs, comparisons = self._run(backend, device, 0)
        try:
            _assert_all_close(comparisons)
        except AssertionError:
            # Of few values one may happen to cancel: closeness is judged over several seeds.
            runs = [comparisons, *(self._run(backend, device, seed)[1] for seed in range(1, SEEDS))]
            pooled = [_pooled(same) for same in zip(*runs, strict=True)]
            try:
                _assert_all_close(pooled)
            except AssertionError as error:
                raise AssertionError(f"{self}, {error}") from None
        return outputs

    def _run(self, backend: str, device: str, seed: int) -> tuple[tuple[Tensor, ...], list[Comparison]]:
        arguments = self.arguments(seed)
        given = tuple(_moved(a, device) for a in arguments)
        with tf32(self.tf32):
            outputs = _as_tuple(self.op(backend, *given))
        for i, (before, after) in enumerate(zip(arguments, given, strict=True)):
            if isinstance(before, Tensor) and not torch.equal(_stored_bytes(before), _stored_bytes(after).cpu()):
                raise AssertionError(f"{self}: the op wrote to its argument {i}")
        for got, planned in zip(outputs, _as_tuple(self.op.fake(*given)), strict=True):
            layouts = [(list(t.shape), t.dtype, t.device, t.stride()) for t in (got, planned)]
            if layouts[0] != layouts[1]:
                raise AssertionError(f"{self}: an output is {layouts[0]}, but {layouts[1]} by the fake kernel")
        return outputs, list(self.compare(arguments, [t.cpu() for t in outputs]))

    def __str__(self) -> str:
        words = [self.op.name]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name != "tag":
                words.append(_word(field.name, value))
        return " ".join(words)


def _word(name: str, value: Any) -> str:
    if value is True:
        return name
    if isinstance(value, Enum):
        value = value.name.lower()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if name == "shape":
        return "x".join(map(str, value))
    return value if name in ("layout", "values") else f"{name}={value}"


def _assert_all_close(comparisons: Sequence[Comparison]) -> None:
    for name, got, eager, exact in comparisons:
        try:
            assert_close_to_reference(got, eager, exact)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def _pooled(same: Sequence[Comparison]) -> Comparison:
    """The same comparison of several runs as one."""
    got, eager, exact = (torch.stack([run[i] for run in same]) for i in (1, 2, 3))  # type: ignore[misc]
    return Comparison(same[0].name, got, eager, exact)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _stored_bytes(tensor: Tensor) -> Tensor:
    """All of a tensor's memory, also what lies between its elements."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _moved(argument: Any, device: str) -> Any:
    """A copy on `device` with the strides of the original, in as much memory."""
    if not isinstance(argument, Tensor):
        return argument
    memory = _stored_bytes(argument).to(device, copy=True).view(argument.dtype)
    return memory.as_strided(argument.shape, argument.stride(), argument.storage_offset())


@cache
def all_cases() -> tuple[Case, ...]:
    """Those of every op that has a cases.py, each once."""
    found: dict[str, Case] = {}
    for op in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        if op.ispkg and importlib.util.find_spec(f"{op.name}.cases"):
            for case in importlib.import_module(f"{op.name}.cases").CASES:
                found.setdefault(str(case), case)
    return tuple(found.values())


def cases_for(backend: str, *tags: str) -> list[Case]:
    """Those that `backend` has kernels for; of all tags, or of those given."""
    return [
        case
        for case in all_cases()
        if backend in case.op.overloads and case.dtype in backends.DTYPES[backend] and (not tags or case.tag in tags)
    ]


def assert_close_to_reference(got: Tensor, eager_same_dtype: Tensor, reference64: Tensor) -> None:
    """`got` is as close to the float64 reference as eager PyTorch in the same dtype is, within a factor of two.

    Closeness is the relative L2 error over the finite values; NaN and infinities stand where the reference has them.
    A floor of a few ulps of the dtype of `got` covers cases that eager happens to compute exactly.
    """
    if got.shape != reference64.shape:
        raise AssertionError(f"shape {list(got.shape)}, expected {list(reference64.shape)}")
    if got.dtype != eager_same_dtype.dtype:
        raise AssertionError(f"dtype {got.dtype}, expected {eager_same_dtype.dtype}")
    got, eager_same_dtype, reference64 = got.detach(), eager_same_dtype.detach(), reference64.detach()
    # A value that the dtype cannot hold is an infinity in it.
    rounded = reference64.to(got.dtype)
    finite = rounded.isfinite()
    torch.testing.assert_close(got[~finite], rounded[~finite], rtol=0, atol=0, equal_nan=True)
    # oneDNN's half-precision convolution of one narrow channel makes NaN of memory that it did not write.
    eager = torch.where(eager_same_dtype.isfinite(), eager_same_dtype.double(), reference64)
    error, allowed = (_relative_error(t[finite], reference64[finite]) for t in (got, eager))
    floor = FLOOR_ULPS_FLOAT64 if got.dtype == torch.float64 else FLOOR_ULPS
    allowed = 2 * allowed + floor * torch.finfo(got.dtype).eps
    if not error <= allowed:
        raise AssertionError(f"relative L2 error {error:.3g}, allowed {allowed:.3g}")


def _relative_error(value: Tensor, reference: Tensor) -> float:
    error = (value.double() - reference).norm()
    return float(error / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def as_float64(arguments: Sequence[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


# --- What cases are made of.

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS = (1, 2, 3, 17, 129)
SIZES = ((1, 1), (1, 7), (7, 1), (13, 15))
LAYOUTS = ("nchw", "channels_last", "sliced nchw", "sliced channels_last")

# Ways to cut a map [n, c, h, w] out of a larger one: the larger one's shape, and the cut.
_CUTS = {
    "sliced": lambda n, c, h, w: ((n, c + 3, h + 2, w + 1), lambda x: x[:, 1:-2, 1:-1, 1:]),
    "aligned": lambda n, c, h, w: ((n, c + 16, h, w), lambda x: x[:, 8:-8]),
    "every-other-channel": lambda n, c, h, w: ((n, 2 * c, h, w), lambda x: x[:, ::2]),
    "every-other-column": lambda n, c, h, w: ((n, c, h, 2 * w), lambda x: x[..., ::2]),
    "every-other-image": lambda n, c, h, w: ((2 * n, c, h, w), lambda x: x[1::2]),
    "transposed": lambda n, c, h, w: ((n, c, w, h), lambda x: x.transpose(2, 3)),
    "batch-as-channels": lambda n, c, h, w: ((c, n, h, w), lambda x: x.transpose(0, 1)),
    "expanded": lambda n, c, h, w: ((1, 1, h, w), lambda x: x.expand(n, c, -1, -1)),
    "misaligned": lambda n, c, h, w: ((n, c, h, w), lambda x: _one_further(x)),
}
CUTS = tuple(_CUTS)


# Where activations bend, saturate or overflow.
_INF, _NAN = float("inf"), float("nan")
_LIMITS = (-_INF, -1e4, -90, -11, -3.5, -3, -1, -0.0, 0, 1, 3, 3.5, 6, 7, 90, _INF, _NAN)


def _one_further(x: Tensor) -> Tensor:
    """`x` moved by one element, off the alignment of fresh memory."""
    return x.new_full((x.numel() + 1,), torch.nan).as_strided(x.shape, x.stride(), 1)


def feature_map(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, layout: str = "nchw", values: str = "normal"
) -> Tensor:
    """A map of random values amid NaN; `layout` is nchw or channels_last, and may have one of `CUTS` before it."""
    *cut, memory = layout.split()
    larger, view = _CUTS[cut[0]](*shape) if cut else (tuple(shape), lambda x: x)
    memory_format = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    whole = torch.full(larger, torch.nan, dtype=dtype).contiguous(memory_format=memory_format)
    x: Tensor = view(whole)
    written = x if whole.numel() >= x.numel() else whole
    written.copy_(_filled(written.shape, dtype, values))
    return x


def _filled(shape: torch.Size, dtype: torch.dtype, values: str) -> Tensor:
    x = torch.randn(shape).to(torch.promote_types(dtype, torch.float32))
    if values == "offset":
        x += 1000
    elif values == "wide":
        x *= 4
    elif values == "denormal":
        x *= torch.finfo(dtype).tiny / 8
    elif values == "limits":
        x.view(-1)[:] = torch.tensor(_LIMITS).repeat(-(-x.numel() // len(_LIMITS)))[: x.numel()]
    elif values == "nonfinite":
        size = max(x.numel(), 3)
        for at, value in zip((0, size // 3, size * 2 // 3), (torch.nan, torch.inf, -torch.inf), strict=True):
            x.view(-1)[at] = value
    return x


def huge(dtype: torch.dtype) -> float:
    """What makes ordinary numbers of the denormal ones of `feature_map`."""
    return 0.5 / torch.finfo(dtype).tiny


class Norm(NamedTuple):
    """BatchNorm and activation, of which any part may be missing. `vectors` is wide, narrow (as x is) or mixed."""

    act: Activation = Activation.IDENTITY
    statistics: bool = True
    affine: bool = True
    vectors: str = "wide"

    def __str__(self) -> str:
        parts = [
            *(["bn"] if self.statistics else []),
            *([] if self.affine else ["plain"]),
            Activation(self.act).name.lower(),
        ]
        return "-".join([*parts, *([] if self.vectors == "wide" else [self.vectors])])

    def make(self, channels: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """mean, var, gamma, beta, eps, act"""
        mean, var = torch.randn(channels), torch.rand(channels) + 0.5
        gamma, beta = torch.randn(channels) + 1, torch.randn(channels)
        kept = [self.statistics] * 2 + [self.statistics and self.affine] * 2
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = {"wide": [wide] * 4, "narrow": [dtype] * 4, "mixed": [wide, dtype] * 2}[self.vectors]
        vectors = zip((mean, var, gamma, beta), kept, dtypes, strict=True)
        return *(v.to(d) if keep else None for v, keep, d in vectors), 1e-3 if self.statistics else 0.0, self.act


def maps(numbers: random.Random) -> Iterator[dict[str, Any]]:
    """shape, layout and dtype for every kind of map, the batch and dtype drawn."""
    for channels, size, layout in itertools.product(CHANNELS, SIZES, LAYOUTS):
        shape = (numbers.choice((1, 2, 3)), channels, *size)
        yield dict(shape=shape, layout=layout, dtype=numbers.choice((*DTYPES, torch.float64)))


def drawn_map(numbers: random.Random) -> dict[str, Any]:
    shape = tuple(numbers.randint(low, high) for low, high in ((0, 3), (1, 40), (1, 20), (1, 20)))
    layout = f"{numbers.choice(('', *CUTS))} {numbers.choice(('nchw', 'channels_last'))}".strip()
    return dict(shape=shape, layout=layout, dtype=numbers.choice((*DTYPES, torch.float64)))


def drawn_norm(numbers: random.Random) -> Norm:
    statistics = numbers.choice((True, False))
    return Norm(numbers.choice(list(Activation)), statistics, numbers.choice((True, False)) or not statistics)
