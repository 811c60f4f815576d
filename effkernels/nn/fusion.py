"""The computation of a block from its parts, on the kernels: what our modules and converted ones run."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkernels import _build, _native, backends
from effkernels.nn import parts
from effkernels.nn.parts import SE, Block, Layer, Unfusable
from effkernels.ops import bn_act, dwconv_bn_swish, mbconv, squeeze_excite
from effkernels.ops._checks import autocast_dtype, autocasts
from effkernels.ops.bn_project import Stage, bn_project
from effkernels.ops.conv_inference import Convolution, conv_bn_act, pack_convolution
from effkernels.ops.conv_inference.op import CONV_INFERENCE
from effkernels.ops.dwconv import Norm, bn_act_dwconv_bn_act
from effkernels.ops.mbconv.op import MBCONV
from effkernels.ops.mbconv_inference import Gate, mbconv_inference, pack_block
from effkernels.ops.mbconv_inference.op import MBCONV_INFERENCE


class Fused(nn.Module):
    """A module that runs on the fused ops while its parts are untouched, else as its `unfused` forward says.

    A subclass gives `read_parts`, `fused` and `unfused`.
    """

    def read_parts(self) -> Any:
        """What `fused` needs, read from the child modules. Raises Unfusable if one of them has been altered."""
        raise NotImplementedError

    def fused(self, parts: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    def unfused(self, x: Tensor) -> Tensor:
        """The plain composition of the child modules, which is also the `eager` backend."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        frozen: Frozen | None = self.__dict__.get("_frozen")
        if frozen is not None:
            return frozen(self, x)
        if not isinstance(x, Tensor) or x.dim() != 4:  # a tracer's proxy, an image with no batch dimension
            return self.unfused(x)
        found: Any = None
        obstacle: object = None
        if parts.global_hooks():
            obstacle = "hooks are registered for all modules"
        elif (slower := backends.trains_slower(x)) and _trains(self, x):
            obstacle = slower
        else:
            try:
                found = self.read_parts()
            except Unfusable as altered:
                obstacle = altered
        if backends.choose(type(self).__qualname__, x, obstacle) == "eager":
            return self.unfused(x)
        return self.fused(found, x)


def _trains(module: nn.Module, x: Tensor) -> bool:
    return (
        module.training
        and torch.is_grad_enabled()
        and (x.requires_grad or any(p.requires_grad for p in module.parameters()))
    )


class Frozen:
    """What a module runs whose weights `effkernels.freeze` packed. A deep copy stays frozen, a pickle does not."""

    def __init__(self, run: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> None:
        self._run = run
        self._tensors = tensors
        self._versions = [t._version for t in tensors]

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._check(module, x)
            backends.choose(f"{type(module).__qualname__}, frozen", x)
        return self._run(x)

    def _check(self, module: nn.Module, x: Tensor) -> None:
        if module.training or [t._version for t in self._tensors] != self._versions:
            what = "is in training mode" if module.training else "has other weights than when it was frozen"
            raise RuntimeError(f"a frozen {type(module).__qualname__} {what}; call effkernels.unfreeze first")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a frozen block has no gradient; call effkernels.unfreeze first")
        if not backends.takes(CONV_INFERENCE.kernels, x):
            reason = backends.why_not("cpp", x) or "use_backend asked for another"
            raise RuntimeError(f"a frozen block runs on backend 'cpp' only: {reason}")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return Frozen(self._run, copy.deepcopy(self._tensors, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class FusedBlock(Fused):
    memory: str = "default"  # of `ops.mbconv`

    def fused(self, block: Block, x: Tensor) -> Tensor:
        return run_block(block, x, self.memory)


class FusedSE(Fused):
    def fused(self, se: SE, x: Tensor) -> Tensor:
        return run_se(se, x)


def run_block(block: Block, x: Tensor, memory: str) -> Tensor:
    inference = _is_inference(block.layers(), block.se, x)
    trains = not inference and x.shape[0] > 0 and backends.takes(MBCONV.kernels, x)
    if trains and _is_mbconv(block):
        return _train_mbconv(block, x, memory)
    if trains and block.depthwise is None and block.project is not None:
        return _train_fused_mbconv(block, x)
    expand, depthwise, se, project = block[:4]
    if inference and _is_mbconv(block) and backends.takes(MBCONV_INFERENCE.kernels, x):
        return _run_whole(block, x)
    if inference and se is None and backends.takes(CONV_INFERENCE.kernels, x) and _all_dense(block, x.dtype):
        return _run_dense(block, x)
    y, pooled = x, None
    if inference and expand is not None and depthwise is not None:
        y, pooled = _expand_depthwise(expand, depthwise, y, pool=se is not None)
    else:
        if expand is not None:
            y = _run_conv(expand, y)
        if depthwise is not None and se is not None:
            y, pooled = run_depthwise(depthwise, y, return_pooled=True)
        elif depthwise is not None:
            y = run_depthwise(depthwise, y)
    if se is not None:
        y = run_se(se, y, pooled)
    if project is not None:
        y = (_project_folded if inference else _run_conv)(project, y)
    if block.shortcut is not None:
        y = block.shortcut(block.drop_path(y), x)
    return y


def _is_inference(layers: Iterable[Layer], se: SE | None, x: Tensor) -> bool:
    layers = list(layers)
    if any(parts.uses_batch_statistics(layer.bn) for layer in layers):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or parts.requires_grad(iter(layers), se)))


def _run_whole(block: Block, x: Tensor) -> Tensor:
    """A block with a depthwise convolution and a projection, in one op."""
    residual = adds_x(block, x.device.type)
    y: Tensor = mbconv_inference(x, **_block(block), residual=residual)
    return y if block.shortcut is None or residual else block.shortcut(block.drop_path(y), x)


def adds_x(block: Block, device: str = "cpu") -> bool:
    """Whether the shortcut is a plain sum in the dtype of x."""
    return block.shortcut is not None and parts.passes(block.drop_path) and not autocasts(device)


def packed(found: Block | Layer) -> Callable[[Tensor], Tensor] | None:
    """What runs a block or a layer in inference on the CPU with its weights packed now; None if no op does."""
    layers = [found] if isinstance(found, Layer) else list(found.layers())
    residual = isinstance(found, Block) and adds_x(found)
    if isinstance(found, Block):
        if found.shortcut is not None and not residual:
            return None
        if _is_mbconv(found):
            block = pack_block(**_block(found))
            return lambda x: block(x, residual)
        if found.se is not None:
            return None
    if not all(is_dense(layer, layer.conv.weight.dtype) for layer in layers):
        return None
    *before, last = (pack_convolution(_convolution(layer), **_window(layer)) for layer in layers)

    def run(x: Tensor) -> Tensor:
        y = x
        for layer in before:
            y = layer(y)
        return last(y, x if residual else None)

    return run


def _block(block: Block) -> dict[str, Any]:
    """What `mbconv_inference` takes, but x and the shortcut."""
    expand, depthwise, se, project = block[:4]
    assert depthwise is not None and project is not None
    return {
        "expand": None if expand is None else _convolution(expand),
        "depthwise": _convolution(depthwise),
        "gate": None if se is None else _gate(se),
        "project": _convolution(project),
        **_window(depthwise),
    }


def _convolution(layer: Layer) -> Convolution:
    norm = _fixed_norm(layer)
    if layer.conv.bias is not None:
        norm = norm._replace(running_mean=norm.running_mean - layer.conv.bias)
    return Convolution(layer.conv.weight, norm)


def _is_mbconv(block: Block) -> bool:
    expand, depthwise, _, project = block[:4]
    return depthwise is not None and project is not None and (expand is None or parts.is_pointwise(expand.conv))


def _train_mbconv(block: Block, x: Tensor, memory: str) -> Tensor:
    expand, depthwise, se, project = block[:4]
    assert depthwise is not None and project is not None
    _count_batch(expand, depthwise, project)

    def branch(scale: Tensor | None, residual: bool) -> Tensor:
        return mbconv(
            x,
            None if expand is None else _stage(expand),
            _stage(depthwise),
            None if se is None else _gate(se),
            _stage(project),
            **_window(depthwise),
            scale=scale,
            residual=residual,
            memory=memory,
        )

    return _with_shortcut(block, x, branch)


def _train_fused_mbconv(block: Block, x: Tensor) -> Tensor:
    """The dense convolution is the library's."""
    expand, _, se, project = block[:4]
    assert expand is not None and project is not None
    e = expand.conv(x)
    _count_batch(expand, project)

    def branch(scale: Tensor | None, residual: bool) -> Tensor:
        return bn_project(
            e,
            **_norm(expand.bn),
            activation=expand.activation,
            squeeze_excite=None if se is None else _gate(se),
            project=_stage(project),
            scale=scale,
            residual=x if residual else None,
        )

    return _with_shortcut(block, x, branch)


def _with_shortcut(block: Block, x: Tensor, branch: Callable[[Tensor | None, bool], Tensor]) -> Tensor:
    """`branch(scale, residual)` with drop path and shortcut, inside it where that gives the same."""
    drop_path, shortcut = block.drop_path, block.shortcut
    cast = autocast_dtype(x) not in (None, x.dtype)
    # Under autocast a shortcut may be wider than the branch; `shortcut` knows the dtype of their sum.
    if shortcut is not None and not cast and parts.scales_images(drop_path):
        return branch(_image_factors(drop_path, x), True)
    y = branch(None, False)
    return y if shortcut is None else shortcut(drop_path(y), x)


def _stage(layer: Layer) -> Stage:
    return Stage(layer.conv.weight, layer.conv.bias, **_norm(layer.bn), activation=layer.activation)


def _gate(se: SE) -> Gate:
    return Gate(se.reduce.weight, se.reduce.bias, se.expand.weight, se.expand.bias, se.activation, se.gate)


def _image_factors(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """What stochastic depth multiplies each image by, [N], drawn as if it were applied to the branch; None: nothing."""
    ones = x.new_ones((x.shape[0], 1, 1, 1))
    factors = drop_path(ones)
    return None if factors is ones else factors.flatten()


def run_conv(layer: Layer, x: Tensor) -> Tensor:
    if _is_inference([layer], None, x) and backends.takes(CONV_INFERENCE.kernels, x) and is_dense(layer, x.dtype):
        return conv_bn_act(x, _convolution(layer), **_window(layer))
    return _run_conv(layer, x)


def _run_conv(layer: Layer, x: Tensor) -> Tensor:
    """A convolution of PyTorch's library, then BatchNorm and activation in one op."""
    _count_batch(layer)
    return bn_act(layer.conv(x), **_norm(layer.bn), activation=layer.activation)


def is_dense(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether `conv_bn_act` computes the layer. 16-bit ones stay with the library, unless the kernels too have
    instructions for their products."""
    conv = layer.conv
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.stride[0] == conv.stride[1]
        and conv.padding_mode == "zeros"
        and (type(conv) in parts.SAME_PADDED or conv.padding == "same" or len(set(conv.padding)) == 1)
        and conv.weight.dtype == dtype
        and (dtype.itemsize >= 4 or (dtype == torch.bfloat16 and _native.CPU_ISA in _build.BFLOAT16_ISAS))
        and not torch.is_autocast_enabled("cpu")
    )


def _all_dense(block: Block, dtype: torch.dtype) -> bool:
    return all(is_dense(layer, dtype) for layer in block.layers())


def _run_dense(block: Block, x: Tensor) -> Tensor:
    """A block of dense convolutions: the last one adds x."""
    *before, last = block.layers()
    residual = adds_x(block)
    y = x
    for layer in before:
        y = conv_bn_act(y, _convolution(layer), **_window(layer))
    y = conv_bn_act(y, _convolution(last), **_window(last), shortcut=x if residual else None)
    return y if block.shortcut is None or residual else block.shortcut(block.drop_path(y), x)


def _window(layer: Layer) -> dict[str, Any]:
    return {"stride": layer.conv.stride[0], "padding": parts.padding(layer.conv)}


def run_depthwise(layer: Layer, x: Tensor, *, return_pooled: bool = False) -> Any:
    conv, bn, activation = layer
    _count_batch(layer)
    return dwconv_bn_swish(
        x,
        conv.weight,
        **_norm(bn),
        stride=conv.stride[0],
        padding=parts.padding(conv),
        activation=activation,
        return_pooled=return_pooled,
    )


def run_se(se: SE, x: Tensor, pooled: Tensor | None = None) -> Tensor:
    return squeeze_excite(
        x,
        se.reduce.weight,
        se.reduce.bias,
        se.expand.weight,
        se.expand.bias,
        activation=se.activation,
        gate=se.gate,
        pooled=pooled,
    )


def _count_batch(*layers: Layer | None) -> None:
    """What `nn.BatchNorm2d.forward` does first, of several in one launch."""
    counts = [_batches(layer.bn) for layer in layers if layer is not None]
    counted = [count for count in counts if count is not None]
    if counted:
        torch._foreach_add_(counted, 1)


def _batches(bn: parts.BatchNorm) -> Tensor | None:
    """How many batches a BatchNorm has seen, if it counts them now."""
    return bn.num_batches_tracked if bn.training and bn.track_running_stats else None


def _norm(bn: parts.BatchNorm) -> dict[str, Any]:
    """The BatchNorm arguments of an op, as `nn.BatchNorm2d.forward` has them after it has counted the batch."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    count = _batches(bn)
    if bn.momentum is None and count is not None:
        momentum = 1.0 / float(count)
    tracked = bn.track_running_stats or not bn.training
    return {
        "bn_weight": bn.weight,
        "bn_bias": bn.bias,
        "running_mean": bn.running_mean if tracked else None,
        "running_var": bn.running_var if tracked else None,
        "training": parts.uses_batch_statistics(bn),
        "momentum": momentum,
        "eps": bn.eps,
        "process_group": parts.process_group(bn),
    }


def _expand_depthwise(expand: Layer, depthwise: Layer, x: Tensor, *, pool: bool) -> tuple[Tensor, Tensor | None]:
    conv = depthwise.conv
    return bn_act_dwconv_bn_act(
        expand.conv(x),
        _fixed_norm(expand),
        conv.weight,
        _fixed_norm(depthwise),
        stride=conv.stride[0],
        padding=parts.padding(conv),
        return_pooled=pool,
    )


def _fixed_norm(layer: Layer) -> Norm:
    # Not by `nn.Module.__getattr__`, which takes some 0.3 us for each: a block has twelve.
    parameters, buffers = layer.bn._parameters, layer.bn._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    assert mean is not None and var is not None
    return Norm(mean, var, parameters["weight"], parameters["bias"], layer.bn.eps, layer.activation)


def _project_folded(layer: Layer, x: Tensor) -> Tensor:
    """The 1x1 convolution with its BatchNorm folded into the weight, where that is smaller than the output."""
    conv, bn, _ = layer
    n, c, h, w = x.shape
    if c >= n * h * w:
        return _run_conv(layer, x)
    assert bn.running_mean is not None and bn.running_var is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = (bn.running_var.to(wide) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    bias = -bn.running_mean * scale if conv.bias is None else (conv.bias - bn.running_mean) * scale
    if bn.bias is not None:
        bias = bias + bn.bias
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight.to(conv.weight.dtype), bias.to(conv.weight.dtype))
