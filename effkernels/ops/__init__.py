"""Fused ops. Each folder holds an op's function, schema and autograd formula, reference and Triton kernels."""

from effkernels.ops._tiles import use_tile
from effkernels.ops.batch_norm import bn_act
from effkernels.ops.conv_inference import conv_bn_act
from effkernels.ops.dwconv import dwconv_bn_swish
from effkernels.ops.mbconv import mbconv
from effkernels.ops.mbconv_inference import mbconv_inference
from effkernels.ops.squeeze_excite import squeeze_excite, squeeze_excite_gate

__all__ = [
    "bn_act",
    "conv_bn_act",
    "dwconv_bn_swish",
    "mbconv",
    "mbconv_inference",
    "squeeze_excite",
    "squeeze_excite_gate",
    "use_tile",
]
