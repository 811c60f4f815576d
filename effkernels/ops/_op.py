"""Dispatcher ops: one schema, one fake kernel and one autograd formula, an overload per backend."""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

KERNEL_BACKENDS = ("cpp", "cuda", "triton")
# A phase that a backend has no kernel for is its stand-in's, which runs on the same tensors.
STAND_INS = {"cuda": "triton"}
_library = torch.library.Library("effkernels", "DEF")

# Of each fusion's overload, the Python function that calls its phases.
COMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
# The op of each overload.
OPS: dict[torch._ops.OpOverload, "Op"] = {}


class Flops(NamedTuple):
    """The operations of convolutions and matrix products, two for a multiply-add."""

    matrix: int = 0  # of those that matrix units can take
    depthwise: int = 0

    @property
    def total(self) -> int:
        return self.matrix + self.depthwise


class Access(NamedTuple):
    """The bytes of a tensor that a call reads and writes."""

    tensor: torch.Tensor
    read: int = 0
    written: int = 0


class Op:
    """`effkernels::<name>.<backend>` for each of `backends`, by default every kernel backend.

    Every backend is an overload with the same schema, so that a traced graph says which kernel it runs. C++ registers
    its overloads when its library is loaded; Python ones are given to `implement`. Ops are functional. `backward` is
    called as `backward(backend, ctx, *grads)`, `flops` and what `accesses` asks as the op itself. A fusion with phases
    that not every backend has a kernel for `borrows` those of the stand-ins.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        backends: Sequence[str] = KERNEL_BACKENDS,
        borrows: bool = False,
        parts_read: Callable[..., dict[str, Sequence[int]]] = lambda *_: {},
        times_read: Callable[..., dict[str, int]] = lambda *_: {},
        scratch: Callable[..., dict[str, torch.Tensor]] = lambda *_: {},
        flops: Callable[..., Flops] = lambda *_: Flops(),
    ) -> None:
        self.name = name
        self.fake = fake
        self._parts_read = parts_read
        self._times_read = times_read
        self._scratch = scratch
        self.flops = flops
        self._functions: dict[str, Callable[..., Any]] = {}
        self.overloads: dict[str, torch._ops.OpOverload] = {}
        # Of each backend, those whose kernels it runs.
        self.kernels = {b: (b, STAND_INS[b]) if borrows and b in STAND_INS else (b,) for b in backends}
        for backend in backends:
            qualified = f"effkernels::{name}.{backend}"
            _library.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(qualified, fake, lib=_library)
            overload = getattr(getattr(torch.ops.effkernels, name), backend)
            formula = once_differentiable(partial(backward, backend)) if backward else _no_gradient(name)
            torch.library.register_autograd(overload, formula, setup_context=setup_context, lib=_library)
            self.overloads[backend] = overload
            OPS[overload] = self
            if backward and setup_context:
                self._functions[backend] = _function(f"{name}_{backend}", overload, setup_context, formula)

    def implement(self, backend: str, function: Callable[..., Any]) -> None:
        """Register a Python implementation."""
        _library.impl(f"{self.name}.{backend}", function, "CompositeExplicitAutograd")

    def compose(self, function: Callable[..., Any]) -> None:
        """Register `function(backend, *args)`, which calls the phase ops of `backend`, for every backend."""
        for backend, overload in self.overloads.items():
            COMPOSITIONS[overload] = partial(function, backend)
            self.implement(backend, COMPOSITIONS[overload])

    def implement_in_triton(self, module: str) -> None:
        """Register the function named like this op in `module`, imported at the first call: triton is optional."""

        def implementation(x: torch.Tensor, *args: Any) -> Any:
            with torch.cuda.device_of(x):
                return getattr(importlib.import_module(module), self.name)(x, *args)

        self.implement("triton", implementation)

    def accesses(self, arguments: Sequence[Any], outputs: Any) -> dict[str, Access]:
        """What a call reads of each tensor argument and writes of each output, at least.

        Arguments are read whole and once, unless `parts_read` gave the shape of a part and `times_read` a number.
        `scratch` are maps in memory of its own, written and read once, as meta tensors.
        """
        schema = next(iter(self.overloads.values()))._schema
        given = zip(schema.arguments, arguments, strict=True)
        tensors = {argument.name: t for argument, t in given if isinstance(t, torch.Tensor)}
        if any(t.numel() == 0 for t in tensors.values()):
            return {name: Access(t) for name, t in tensors.items()}  # nothing is launched
        parts, times = self._parts_read(*arguments), self._times_read(*arguments)
        found = {
            name: Access(t, read=size(t, parts.get(name, t.shape)) * times.get(name, 1)) for name, t in tensors.items()
        }
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        for returned, t in zip(schema.returns, outputs, strict=True):
            found[returned.name or "result"] = Access(t, written=size(t))
        for name, t in self._scratch(*arguments).items():
            found[name] = Access(t, read=size(t), written=size(t))
        return found

    def bytes(self, arguments: Sequence[Any], outputs: Any) -> dict[str, int]:
        """Of each tensor of `accesses` the bytes read and written."""
        return {name: a.read + a.written for name, a in self.accesses(arguments, outputs).items()}

    def __call__(self, backend: str, *args: Any) -> Any:
        if backend not in self.overloads:
            backend = STAND_INS[backend]
        if torch.compiler.is_compiling():
            return self.overloads[backend](*args)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise RuntimeError(
                f"effkernels::{self.name}.{backend} has no forward-mode derivative; use_backend('eager') has"
            )
        # The autograd.Function is the same formula with a small part of register_autograd's overhead per call.
        if (
            backend in self._functions
            and torch.is_grad_enabled()
            and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        ):
            return self._functions[backend](*args)
        if torch.is_grad_enabled():
            return self.overloads[backend](*args)
        with torch._C._AutoDispatchBelowAutograd():  # which has nothing to record, and is slow to see that
            return self.overloads[backend](*args)


def _function(
    name: str, overload: Callable[..., Any], setup_context: Callable[..., None], formula: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*args)
        setup_context(ctx, args, output)
        return output

    def function(**members: Callable[..., Any]) -> Any:
        return type(name, (torch.autograd.Function,), {key: staticmethod(member) for key, member in members.items()})

    # For a `setup_context` of its own the signature is inspected at each call; functorch insists on one.
    plain = function(forward=forward, backward=formula)
    transformed = function(forward=overload, setup_context=setup_context, backward=formula)

    def apply(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*args)
        return super(torch.autograd.Function, plain).apply(*args)  # nor does this inspect it

    return apply


def size(tensor: torch.Tensor, shape: Sequence[int] | None = None) -> int:
    """The bytes of `tensor`, or of a part of it with this shape; those of an expanded dimension count once."""
    sizes = zip(tensor.shape if shape is None else shape, tensor.stride(), strict=True)
    return math.prod(length for length, stride in sizes if stride) * tensor.element_size()


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _no_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"effkernels::{name} is a phase of a fused op and has no gradient of its own")

    return backward
