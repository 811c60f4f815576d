"""Dispatcher ops: one schema, one fake kernel and one autograd formula, an overload per backend."""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

KERNEL_BACKENDS = ("cpp", "cuda", "triton")
_library = torch.library.Library("effkernels", "DEF")

# Of each fusion's overload, the Python function that calls its phases.
COMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
# The op of each overload.
OPS: dict[torch._ops.OpOverload, "Op"] = {}


class Op:
    """`effkernels::<name>.<backend>` for each of `backends`, by default every kernel backend.

    Every backend is an overload with the same schema, so that a traced graph says which kernel it runs. C++ registers
    its overloads when its library is loaded; Python ones are given to `implement`. Ops are functional. `backward` is
    called as `backward(backend, ctx, *grads)`.
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
        unseen_bytes: Callable[..., int] | None = None,
        parts_read: Callable[..., dict[str, Sequence[int]]] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = name
        self.fake = fake
        self._unseen_bytes = unseen_bytes
        self._parts_read = parts_read
        self._flops = flops
        self._functions: dict[str, Any] = {}
        self.overloads: dict[str, torch._ops.OpOverload] = {}
        for backend in backends:
            qualified = f"effkernels::{name}.{backend}"
            _library.define(f"{name}.{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(qualified, fake, lib=_library)
            overload = getattr(getattr(torch.ops.effkernels, name), backend)
            formula = once_differentiable(partial(backward, backend)) if backward else _no_gradient(name)
            torch.library.register_autograd(overload, formula, setup_context=setup_context, lib=_library)
            self.overloads[backend] = overload
            OPS[overload] = self
            if backward:
                members = {"forward": overload, "setup_context": setup_context, "backward": formula}
                self._functions[backend] = type(
                    f"{name}_{backend}", (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()}
                )

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

    def bytes(self, arguments: Sequence[Any], outputs: Any) -> dict[str, int]:
        """Of each tensor argument the bytes that a call reads at least once, of each output those that it writes.

        Arguments are read whole, unless `parts_read` gave the shape of a part. `unseen_bytes` are what it reads and
        writes beside that.
        """
        schema = next(iter(self.overloads.values()))._schema
        given = zip(schema.arguments, arguments, strict=True)
        tensors = {argument.name: t for argument, t in given if isinstance(t, torch.Tensor)}
        if any(t.numel() == 0 for t in tensors.values()):
            return dict.fromkeys(tensors, 0)  # nothing is launched
        parts = self._parts_read(*arguments) if self._parts_read else {}
        amounts = {name: _size(parts.get(name, t.shape), t) for name, t in tensors.items()}
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        amounts |= {r.name or "result": _size(t.shape, t) for r, t in zip(schema.returns, outputs, strict=True)}
        if self._unseen_bytes:
            amounts["unseen"] = self._unseen_bytes(*arguments)
        return amounts

    def flops(self, *args: Any) -> int:
        """The operations of the op's convolutions and matrix products, two for a multiply-add."""
        return self._flops(*args) if self._flops else 0

    def __call__(self, backend: str, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overloads[backend](*args)
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise RuntimeError(
                f"effkernels::{self.name}.{backend} has no forward-mode derivative; use_backend('eager') has"
            )
        # The autograd.Function is the same formula with a third of register_autograd's overhead per call.
        if (
            backend in self._functions
            and torch.is_grad_enabled()
            and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        ):
            return self._functions[backend].apply(*args)
        return self.overloads[backend](*args)


def _size(shape: Sequence[int], tensor: torch.Tensor) -> int:
    """The bytes of a part of `tensor` with this shape; those of an expanded dimension count once."""
    sizes = (size for size, stride in zip(shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def _has_tangent(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None


def _no_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"effkernels::{name} is a phase of a fused op and has no gradient of its own")

    return backward
