"""Several processes, under torchrun and gloo."""

import copy
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import zoo
from runs import forward_backward
from torch import nn

from effkernels import ops, use_backend
from effkernels.nn import MBConv

WORKER = pathlib.Path(__file__).parent / "processes.py"


@pytest.mark.parametrize("processes", [2, 4])
def test_processes(processes):
    zoo.torchvision(), zoo.timm()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", WORKER]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_alone_synchronised_batch_norm_is_batch_norm(backend):
    plain, images = MBConv(8, 8), [torch.randn(2, 8, 6, 6)]
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    expected, got = (forward_backward(module, images) for module in (plain, synchronised))
    for name in expected:
        assert all(map(torch.equal, got[name], expected[name]))


def test_process_groups_that_cannot_be(tmp_path):
    x, vector = torch.randn(2, 4, 3, 3), torch.ones(4)
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup or None, got str"):
        ops.bn_act(x, None, None, vector, vector, training=True, process_group="world")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        world = torch.distributed.group.WORLD
        with use_backend("eager"), pytest.raises(RuntimeError, match="backend 'eager' has no synchronised statistics"):
            ops.bn_act(x, None, None, vector, vector, training=True, process_group=world)
    finally:
        torch.distributed.destroy_process_group()
