"""What autograd keeps for the backward pass."""

import copy

import pytest
import torch
import zoo
from torch import nn

import effkernels
from effkernels.nn import FusedMBConv
from effkernels.profiling.saved import saved_bytes


def test_each_storage_counts_once_and_parameters_do_not():
    layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    kept = saved_bytes(lambda: (layer(x) + layer(x)).exp() * x[:, :4], parameters=layer.parameters())
    assert sorted(kept) == [3 * 4 * 4, 3 * 8 * 4]  # the exponential and x
    with torch.no_grad():
        assert saved_bytes(layer, x) == []


def test_fused_mbconv_keeps_raw_convolution_outputs():
    block, x = FusedMBConv(16, 16, drop_path=0.5), torch.randn(4, 16, 12, 12, requires_grad=True)
    kept = sum(saved_bytes(block, x, parameters=block.parameters()))
    maps = (16 + 64 + 16) * 4 * 144 * 4
    assert maps < kept < 1.02 * maps


@pytest.mark.parametrize("memory, least, most", [("default", 0.2, 0.36), ("minimal", 0.15, 0.2)])
def test_the_blocks_of_b0_keep_a_third_of_what_eager_keeps_or_a_fifth(memory, least, most):
    blocks = zoo.torchvision().models.efficientnet_b0().features[1:8]
    converted = effkernels.convert(copy.deepcopy(blocks), memory=memory)
    x = torch.randn(1, 32, 224 // 2, 224 // 2, requires_grad=True)
    eager, ours = (sum(saved_bytes(m, x, parameters=m.parameters())) for m in (blocks, converted))
    assert least < ours / eager <= most
