"""Whole MBConv and Fused-MBConv blocks."""

import pytest
import suite
import torch

import effkernels

KINDS = {"mbconv": effkernels.MBConv, "fused": effkernels.FusedMBConv}


@pytest.mark.benchmark(group="blocks")
def test_block(benchmark, setting, block, direction, dtype):
    kind, in_channels, out_channels, size, kernel_size, stride, expand_ratio, se_channels = block
    module = KINDS[kind](
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        expand_ratio=expand_ratio,
        se_channels=se_channels or None,
        se_ratio=0,
    )
    x = torch.randn(suite.BATCH, in_channels, size, size, requires_grad=True)
    suite.compare(benchmark, setting, *suite.contenders(setting, module, x, direction, dtype))
