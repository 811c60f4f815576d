"""What other tests rely on."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fresh_memory_is_nan(dtype):
    for size in (33, 1000, 10**6):
        del_me = torch.ones(size, dtype=dtype)
        del del_me
        assert torch.empty(size, dtype=dtype).isnan().all()
