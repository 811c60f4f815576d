"""Cases of `spatial_mean`, `se_gate`, `se_gate_backward` and `channel_scale`."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from effkernels.ops._activation import ACTIVATIONS, Activation
from effkernels.ops._cases import DTYPES, Case, Comparison, as_float64, drawn_map, feature_map, huge, maps
from effkernels.ops._op import Op
from effkernels.ops.batch_norm.cases import CORE_MAPS, CUT_MAPS, LARGE_MAPS, compare_sums
from effkernels.ops.batch_norm.op import Reduce, statistics_dtype
from effkernels.ops.squeeze_excite import reference
from effkernels.ops.squeeze_excite.op import CHANNEL_SCALE, SE_GATE, SE_GATE_BACKWARD, SPATIAL_MEAN


@dataclass(frozen=True, kw_only=True)
class SpatialMean(Case):
    op: ClassVar[Op] = SPATIAL_MEAN
    shape: tuple[int, int, int, int]
    layout: str = "nchw"
    values: str = "normal"

    def make(self) -> tuple[Any, ...]:
        return (feature_map(self.shape, self.dtype, self.layout, self.values),)

    @classmethod
    def drawn(cls, numbers: random.Random) -> "SpatialMean":
        return cls(**drawn_map(numbers))

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        return compare_sums(outputs[0], arguments[0], Reduce.MEAN)


@dataclass(frozen=True, kw_only=True)
class ChannelScale(Case):
    op: ClassVar[Op] = CHANNEL_SCALE
    shape: tuple[int, int, int, int]
    layout: str = "nchw"
    values: str = "normal"
    strided_gate: bool = False

    def make(self) -> tuple[Any, ...]:
        x = feature_map(self.shape, self.dtype, self.layout, self.values)
        n, c = self.shape[:2]
        gate = torch.rand(c, n).T if self.strided_gate else torch.rand(n, c)
        if self.values == "denormal":
            gate *= huge(self.dtype)
        return x, gate.to(statistics_dtype(x))

    @classmethod
    def drawn(cls, numbers: random.Random) -> "ChannelScale":
        return cls(**drawn_map(numbers), strided_gate=numbers.choice((True, False)))

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        exact = reference.channel_scale(*as_float64(arguments))
        yield Comparison("y", outputs[0], reference.channel_scale(*arguments), exact)


@dataclass(frozen=True, kw_only=True)
class SeGate(Case):
    """`dtype` is that of the weights."""

    op: ClassVar[Op] = SE_GATE
    batch: int
    channels: int
    reduced: int
    biases: tuple[bool, bool] = (True, True)
    act: Activation = Activation.SILU
    gate: Activation = Activation.SIGMOID
    strided: bool = False

    def make(self) -> tuple[Any, ...]:
        n, c, r = self.batch, self.channels, self.reduced

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(columns, rows).T if self.strided else torch.randn(rows, columns)

        pooled = matrix(n, c).to(torch.promote_types(self.dtype, torch.float32))
        w1, w2 = (matrix(r, c) / c**0.5).to(self.dtype), (matrix(c, r) / r**0.5).to(self.dtype)
        b1, b2 = (
            torch.randn(size).to(self.dtype) if given else None for size, given in zip((r, c), self.biases, strict=True)
        )
        return pooled, w1, b1, w2, b2, self.act, self.gate

    @classmethod
    def drawn(cls, numbers: random.Random) -> "SeGate":
        return cls(
            batch=numbers.randint(0, 4), channels=numbers.randint(1, 150), reduced=numbers.randint(1, 40),
            biases=(numbers.choice((True, False)), numbers.choice((True, False))),
            act=numbers.choice(list(Activation)), gate=numbers.choice((Activation.SIGMOID, Activation.HARDSIGMOID)),
            strided=numbers.choice((True, False)), dtype=numbers.choice((*DTYPES, torch.float64)),
        )  # fmt: skip

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        exact = reference.gate_of(*as_float64(arguments))
        yield Comparison("gate", outputs[0], reference.gate_of(*arguments), exact)


@dataclass(frozen=True, kw_only=True)
class SeGateBackward(SeGate):
    op: ClassVar[Op] = SE_GATE_BACKWARD
    sums: bool = True
    area: int = 49

    def make(self) -> tuple[Any, ...]:
        pooled, w1, b1, w2, b2, act, gate = super().make()
        gates = reference.gate_of(pooled, w1, b1, w2, b2, act, gate)
        grad, others = torch.randn(3, *gates.shape, dtype=gates.dtype), torch.randn(2, *gates.shape, dtype=gates.dtype)
        pooled = torch.cat([pooled[None], others])
        if self.strided:
            grad, pooled = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (grad, pooled))
        rows = 3 if self.sums else 1
        return grad[:rows], gates, pooled[:rows], w1, b1, w2, act, gate, self.area

    @classmethod
    def drawn(cls, numbers: random.Random) -> "SeGateBackward":
        gate = SeGate.drawn(numbers)
        given = {field.name: getattr(gate, field.name) for field in fields(gate)}
        given["act"] = numbers.choice(list(ACTIVATIONS.values()))
        return cls(**given, sums=numbers.choice((True, False)), area=numbers.randint(1, 200))

    def compare(self, arguments: tuple[Any, ...], outputs: Sequence[Tensor]) -> Iterator[Comparison]:
        names = ("shift", "sums", "grad_w1", "grad_b1", "grad_w2", "grad_b2")
        eager, exact = reference.gate_backward(*arguments), reference.gate_backward(*as_float64(arguments))
        for name, *same in zip(names, outputs, eager, exact, strict=True):
            yield Comparison(name, *same)


def _cases() -> Iterator[Case]:
    numbers = random.Random(0)
    for m in CORE_MAPS:
        yield SpatialMean(tag="core", **m)
        yield ChannelScale(tag="core", **m)
    for m in (*maps(numbers), *CUT_MAPS, *LARGE_MAPS):
        yield SpatialMean(**m)
        yield ChannelScale(**m)
    for layout, dtype in itertools.product(("nchw", "channels_last"), DTYPES):
        for values in ("nonfinite", "denormal"):
            yield ChannelScale(shape=(2, 18, 6, 7), layout=layout, dtype=dtype, values=values)
    yield SpatialMean(tag="core", shape=(3, 9, 13, 15), values="offset")
    yield ChannelScale(tag="core", shape=(2, 9, 5, 5), strided_gate=True)

    sizes = ((0, 3, 1), (1, 1, 1), (3, 17, 5), (2, 96, 4), (2, 300, 129))
    for (batch, channels, reduced), dtype in itertools.product(sizes, (torch.float32, torch.float16)):
        of_gate: dict[str, Any] = dict(batch=batch, channels=channels, reduced=reduced, dtype=dtype)
        biases = numbers.choice((True, False)), numbers.choice((True, False))
        yield SeGate(tag="core", biases=biases, **of_gate)
        yield SeGateBackward(tag="core", biases=biases, sums=reduced != 4, **of_gate)
    relu: dict[str, Any] = dict(act=Activation.RELU, gate=Activation.HARDSIGMOID)
    for case in (SeGate, SeGateBackward):
        yield case(tag="core", batch=3, channels=17, reduced=5, strided=True, **relu)
    more = ((130, 8, 2), (1, 576, 24), (1, 1152, 48), (5, 129, 2))
    for (batch, channels, reduced), dtype in itertools.product((*sizes, *more), (*DTYPES, torch.float64)):
        for act, gate in itertools.product(Activation, (Activation.SIGMOID, Activation.HARDSIGMOID)):
            if numbers.random() < 0.2:
                of_gate = dict(batch=batch, channels=channels, reduced=reduced, act=act, gate=gate, dtype=dtype)
                yield SeGate(**of_gate, tag="instance" if dtype == torch.bfloat16 and channels == 576 else "")
                if act in ACTIVATIONS.values():
                    yield SeGateBackward(**of_gate)
    yield SeGateBackward(batch=19, channels=100, reduced=33)


CASES = list(_cases())
