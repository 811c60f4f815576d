"""Whole models in inference, fp32, on the same weights: effkernels, eager, torch.compile and inference engines."""

import copy
import io

import pytest
import suite
import torch
import torchvision
from torch import Tensor, nn

import effkernels

MODELS = {"efficientnet_b0": 224, "efficientnet_b4": 380, "efficientnet_v2_s": 300}
# How much faster than the best of the others, by model and batch.
TARGETS = {
    ("efficientnet_b0", 1): 1.6,
    ("efficientnet_b0", 8): 1.9,
    ("efficientnet_b4", 1): 1.4,
    ("efficientnet_b4", 8): 1.4,
    ("efficientnet_v2_s", 1): 1.0,
    ("efficientnet_v2_s", 8): 1.0,
}


def calibrated(name: str, size: int) -> nn.Module:
    """Random weights with statistics that fit them: else activations vanish, and denormals distort times."""
    model = getattr(torchvision.models, name)()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(torch.randn(4, 3, size // 2, size // 2))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def variants(model: nn.Module, x: Tensor):
    """Calls of the implementations that are installed, by name."""
    wide = x.contiguous(memory_format=torch.channels_last)

    def channels_last() -> nn.Module:
        return copy.deepcopy(model).to(memory_format=torch.channels_last)

    eager = channels_last()
    live, frozen = (effkernels.convert(channels_last()) for _ in range(2))
    effkernels.freeze(frozen)
    compiled = torch.compile(channels_last(), options={"freezing": True})
    return {
        "eager nchw": lambda: model(x),
        "eager channels_last": lambda: eager(wide),
        "torch.compile": lambda: compiled(wide),
        **_onnxruntime(model, x),
        **_openvino(model, x),
        "effkernels": lambda: live(wide),
        "effkernels frozen": lambda: frozen(wide),
    }


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=False)
    return file.getvalue()


def _onnxruntime(model: nn.Module, x: Tensor):
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # A pool that spins between calls would disturb the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(_onnx(model, x), options, providers=["CPUExecutionProvider"])
    return {"onnxruntime": lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])}


def _openvino(model: nn.Module, x: Tensor):
    try:
        import onnx  # noqa: F401
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    network = core.compile_model(core.read_model(io.BytesIO(_onnx(model, x))), "CPU", hints | threads)
    request = network.create_infer_request()
    return {"openvino": lambda: torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])}


@pytest.mark.benchmark(group="whole models")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark, name, batch):
    model = calibrated(name, MODELS[name])
    x = torch.randn(batch, 3, MODELS[name], MODELS[name])
    calls = variants(model, x)
    expected = model(x)
    for call in calls.values():
        torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    suite.compare_with_best(benchmark, calls, "effkernels", TARGETS[name, batch])
