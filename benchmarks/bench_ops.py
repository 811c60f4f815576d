"""The fused ops, as modules: depthwise convolution with BatchNorm and Swish, and squeeze-excite."""

import pytest
import suite
import torch

import effkernels


@pytest.mark.benchmark(group="ops")
def test_dwconv(benchmark, setting, depthwise, direction, dtype):
    channels, size, kernel_size, stride = depthwise
    module = effkernels.DepthwiseConvBNAct(channels, kernel_size=kernel_size, stride=stride)
    x = torch.randn(suite.BATCH, channels, size, size, requires_grad=True)
    suite.compare(benchmark, setting, *suite.contenders(setting, module, x, direction, dtype))


@pytest.mark.benchmark(group="ops")
def test_squeeze_excite(benchmark, setting, squeeze_excite, direction, dtype):
    channels, size, reduced_channels = squeeze_excite
    module = effkernels.SqueezeExcite(channels, reduced_channels)
    x = torch.randn(suite.BATCH, channels, size, size, requires_grad=True)
    suite.compare(benchmark, setting, *suite.contenders(setting, module, x, direction, dtype))
