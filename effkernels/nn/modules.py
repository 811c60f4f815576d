"""The blocks of the EfficientNet family."""

import operator
from typing import Any

import torch
from torch import Tensor, nn

from effkernels.nn import parts
from effkernels.nn.fusion import Fused, FusedBlock, FusedSE, run_conv, run_depthwise
from effkernels.nn.layers import Conv2dSame, DropPath
from effkernels.nn.parts import SE, Block, Layer
from effkernels.ops.dwconv import KERNEL_SIZES, STRIDES
from effkernels.ops.mbconv import check_memory

Swish = nn.SiLU  # its PyTorch name

_ACTIVATIONS = {name: cls for cls, name in parts.ACTIVATIONS.items()}
_GATES = {name: cls for cls, name in parts.GATES.items()}


def _module(owner: str, argument: str, name: str, types: dict[str, type]) -> nn.Module:
    if name not in types:
        raise ValueError(f"{owner}: {argument} must be one of {', '.join(types)}, got {name!r}")
    module: nn.Module = types[name]()
    return module


def _padding(owner: str, padding: int | str, kernel_size: int) -> int:
    if padding in ("auto", "same"):
        return kernel_size // 2
    if isinstance(padding, bool) or not isinstance(padding, int):
        raise TypeError(f'{owner}: padding must be an int, "auto" or "same", got {padding!r}')
    return padding


class ConvBNAct(Fused):
    """Convolution without bias, BatchNorm and activation: children `conv`, `bn` and `act`.

    Args:
        in_channels, out_channels, kernel_size, stride, groups: as for `nn.Conv2d`.
        padding: rows and columns of zeros on each side, "auto" (kernel_size // 2) or "same" (TensorFlow's, uneven).
        activation: "silu", "relu", "relu6", "hardswish" or "identity".
        norm_eps, norm_momentum: of the `nn.BatchNorm2d`.
        device, dtype: of the parameters.

    Shape: [N, C, H, W] -> [N, out_channels, Ho, Wo].

    Raises:
        TypeError, ValueError: `padding` or `activation` is none of the above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        padding: int | str = "auto",
        activation: str = "silu",
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = _padding(type(self).__qualname__, padding, kernel_size)
        uneven = padding == "same" and (stride > 1 or kernel_size % 2 == 0)
        cls = Conv2dSame if uneven else nn.Conv2d
        self.conv = cls(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=0 if uneven else rows,
            groups=groups,
            bias=False,
            **factory,
        )
        self.bn = nn.BatchNorm2d(out_channels, norm_eps, norm_momentum, **factory)
        self.act = _module(type(self).__qualname__, "activation", activation, _ACTIVATIONS)

    def unfused(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y

    def read_parts(self) -> Layer:
        return Layer(parts.conv(self.conv), parts.batch_norm(self.bn), parts.activation(self.act))

    def fused(self, layer: Layer, x: Tensor) -> Tensor:
        return run_conv(layer, x)


class DepthwiseConvBNAct(ConvBNAct):
    """Depthwise convolution, BatchNorm and activation: `effkernels.ops.dwconv_bn_swish` with its parameters.

    Args:
        channels: C.
        kernel_size: 3, 5 or 7.
        stride: 1 or 2.
        padding, activation, norm_eps, norm_momentum, device, dtype: as for `ConvBNAct`.

    Shape: [N, C, H, W] -> [N, C, Ho, Wo].

    Raises:
        TypeError, ValueError: an argument is none of the above.
    """

    def __init__(self, channels: int, *, kernel_size: int = 3, stride: int = 1, **kwargs: Any) -> None:
        if kernel_size not in KERNEL_SIZES:
            raise ValueError(f"DepthwiseConvBNAct: kernel_size must be one of {KERNEL_SIZES}, got {kernel_size!r}")
        if stride not in STRIDES:
            raise ValueError(f"DepthwiseConvBNAct: stride must be one of {STRIDES}, got {stride!r}")
        super().__init__(channels, channels, kernel_size=kernel_size, stride=stride, groups=channels, **kwargs)

    def read_parts(self) -> Layer:
        return parts.depthwise_layer(*super().read_parts())

    def fused(self, layer: Layer, x: Tensor) -> Tensor:
        y: Tensor = run_depthwise(layer, x)
        return y


class SqueezeExcite(FusedSE):
    """Squeeze-excite (arXiv:1709.01507): `effkernels.ops.squeeze_excite` with its parameters.

    Args:
        channels: C.
        reduced_channels: R, the width between the two layers.
        activation: between the layers: "silu", "relu", "relu6", "hardswish" or "identity".
        gate: "sigmoid" or "hardsigmoid".
        device, dtype: of the parameters.

    Shape: [N, C, H, W] -> [N, C, H, W].

    Raises:
        ValueError: `activation` or `gate` is none of the above.
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        *,
        activation: str = "silu",
        gate: str = "sigmoid",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduce = nn.Conv2d(channels, reduced_channels, 1, **factory)
        self.act = _module("SqueezeExcite", "activation", activation, _ACTIVATIONS)
        self.expand = nn.Conv2d(reduced_channels, channels, 1, **factory)
        self.gate = _module("SqueezeExcite", "gate", gate, _GATES)

    def unfused(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * gate

    def read_parts(self) -> SE:
        return SE(
            parts.pointwise(self.reduce),
            parts.pointwise(self.expand),
            parts.activation(self.act),
            parts.gate(self.gate),
        )


def _read(module: Fused | None, cls: type[Fused]) -> Any:
    return None if module is None else parts.own(module, cls).read_parts()


class _Block(FusedBlock):
    """Children `expand`, `depthwise`, `se`, `project` in this order, those that it has, and `drop_path`."""

    expand: ConvBNAct | None
    depthwise: DepthwiseConvBNAct | None
    se: SqueezeExcite | None
    project: ConvBNAct | None
    drop_path: DropPath
    has_shortcut: bool

    def unfused(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.expand, self.depthwise, self.se, self.project):
            if layer is not None:
                y = layer(y)
        if self.has_shortcut:
            y = self.drop_path(y)
            y += x
        return y

    def read_parts(self) -> Block:
        project = _read(self.project, ConvBNAct)
        return Block(
            _read(self.expand, ConvBNAct),
            _read(self.depthwise, DepthwiseConvBNAct),
            _read(self.se, SqueezeExcite),
            None if project is None else parts.projection(*project),
            self.drop_path,
            operator.iadd if self.has_shortcut else None,
        )


class MBConv(_Block):
    """Inverted residual with a depthwise convolution and squeeze-excite (arXiv:1801.04381, arXiv:1905.11946).

    `project(se(depthwise(expand(x))))`, each convolution with its BatchNorm, plus x where the shapes agree.

    Args:
        in_channels, out_channels: C and the channels of the output.
        kernel_size: of the depthwise convolution: 3, 5 or 7.
        stride: of the depthwise convolution: 1 or 2.
        expand_ratio: hidden channels over input channels.
        se_ratio: squeeze-excite's width over input channels; 0 for none.
        se_channels: squeeze-excite's width itself, in place of se_ratio.
        se_activation: between squeeze-excite's layers; None: as `activation`.
        expand: whether there is an expand convolution; None: if the ratio is not 1.
        drop_path: probability to drop an image of the residual branch in training.
        activation: "silu", "relu", "relu6", "hardswish" or "identity".
        padding: "auto" (kernel_size // 2), "same" (TensorFlow's, uneven) or a number of rows on each side.
        norm_eps, norm_momentum: of each `nn.BatchNorm2d`.
        memory: in training, of the kernels: "default", or "minimal", which never keeps the expanded map (`ops.mbconv`).
        device, dtype: of the parameters.

    Shape: [N, C, H, W] -> [N, out_channels, Ho, Wo].

    Raises:
        TypeError, ValueError: an argument is none of the above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 6,
        se_ratio: float = 0.25,
        se_channels: int | None = None,
        se_activation: str | None = None,
        expand: bool | None = None,
        drop_path: float = 0.0,
        activation: str = "silu",
        padding: int | str = "auto",
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        memory: str = "default",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_memory("MBConv", memory)
        self.memory = memory
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm: dict[str, Any] = {"norm_eps": norm_eps, "norm_momentum": norm_momentum, **factory}
        hidden = round(in_channels * expand_ratio)
        if expand is None:
            expand = expand_ratio != 1
        if not expand and hidden != in_channels:
            raise ValueError(f"MBConv: expand_ratio must be 1 without an expand convolution, got {expand_ratio}")
        self.expand = ConvBNAct(in_channels, hidden, activation=activation, **norm) if expand else None
        self.depthwise = DepthwiseConvBNAct(
            hidden, kernel_size=kernel_size, stride=stride, padding=padding, activation=activation, **norm
        )
        self.se = _squeeze_excite(in_channels, hidden, se_ratio, se_channels, se_activation or activation, factory)
        self.project = ConvBNAct(hidden, out_channels, activation="identity", **norm)
        self.drop_path = DropPath(drop_path)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        if self.has_shortcut and isinstance(padding, int) and padding != kernel_size // 2:
            raise ValueError(
                f"{type(self).__name__}: padding must keep the map's size where there is a shortcut, "
                f"{kernel_size // 2} for kernel_size {kernel_size}, got {padding}"
            )


class FusedMBConv(_Block):
    """MBConv whose expand and depthwise convolutions are one dense convolution (arXiv:2104.00298).

    `project(se(expand(x)))`, or with expand_ratio 1 a single convolution; plus x where the shapes agree. The dense
    convolution stays with PyTorch's library; what is around it is fused.

    Args:
        in_channels, out_channels: C and the channels of the output.
        kernel_size, stride: of the dense convolution.
        expand_ratio: hidden channels over input channels.
        se_ratio: squeeze-excite's width over input channels; 0 for none.
        se_channels, se_activation, drop_path, activation, padding, norm_eps, norm_momentum, device, dtype: as for
            `MBConv`.

    Shape: [N, C, H, W] -> [N, out_channels, Ho, Wo].

    Raises:
        TypeError, ValueError: an argument is none of the above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 4,
        se_ratio: float = 0.0,
        se_channels: int | None = None,
        se_activation: str | None = None,
        drop_path: float = 0.0,
        activation: str = "silu",
        padding: int | str = "auto",
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm: dict[str, Any] = {"norm_eps": norm_eps, "norm_momentum": norm_momentum, **factory}
        single = expand_ratio == 1
        hidden = out_channels if single else round(in_channels * expand_ratio)
        self.expand = ConvBNAct(
            in_channels, hidden, kernel_size=kernel_size, stride=stride, padding=padding, activation=activation, **norm
        )
        self.depthwise = None
        self.se = _squeeze_excite(in_channels, hidden, se_ratio, se_channels, se_activation or activation, factory)
        self.project = None if single else ConvBNAct(hidden, out_channels, activation="identity", **norm)
        self.drop_path = DropPath(drop_path)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        if self.has_shortcut and isinstance(padding, int) and padding != kernel_size // 2:
            raise ValueError(
                f"{type(self).__name__}: padding must keep the map's size where there is a shortcut, "
                f"{kernel_size // 2} for kernel_size {kernel_size}, got {padding}"
            )


def _squeeze_excite(
    in_channels: int, hidden: int, ratio: float, reduced: int | None, activation: str, factory: dict[str, Any]
) -> SqueezeExcite | None:
    if reduced is None:
        if ratio == 0:
            return None
        reduced = max(1, int(in_channels * ratio))
    return SqueezeExcite(hidden, reduced, activation=activation, **factory)
