"""Whole models of torchvision on the same weights; in inference on the CPU, beside inference engines too."""

import copy
import io

import pytest
import suite
import torch
import torchvision
from torch import Tensor, nn

import effkernels


def calibrated(name: str, size: int) -> nn.Module:
    """Random weights with statistics that fit them: else activations vanish, and denormals distort times."""
    model = getattr(torchvision.models, name)()
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, size // 2, size // 2)], model)
    return model.eval()


def engines(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, suite.Call]:
    """Calls of what else runs the model in inference on the CPU, in float32 or bfloat16, where it is installed."""
    wide = x.to(dtype, memory_format=torch.channels_last)
    frozen = effkernels.convert(copy.deepcopy(model).to(dtype, memory_format=torch.channels_last))
    frozen = effkernels.freeze(frozen)
    ours = {"cpp frozen channels_last": torch.no_grad()(suite.on("cpp", lambda: [frozen(wide)]))}
    calls = ours if suite.kernels(x.device, dtype) else {}
    # ONNX Runtime has no bfloat16 on the CPU.
    return calls | _openvino(model, x, dtype) | (_onnxruntime(model, x) if dtype == torch.float32 else {})


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, input_names=["x"], dynamo=False)
    return file.getvalue()


def _onnxruntime(model: nn.Module, x: Tensor) -> dict[str, suite.Call]:
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
    return {"onnxruntime": lambda: [torch.from_numpy(session.run(None, {"x": x.numpy()})[0])]}


def _openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, suite.Call]:
    try:
        import onnx  # noqa: F401
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    precision = "f32" if dtype == torch.float32 else "bf16"
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    network = core.compile_model(core.read_model(io.BytesIO(_onnx(model, x))), "CPU", hints | threads)
    request = network.create_infer_request()
    return {"openvino": lambda: [torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0])]}


@pytest.mark.benchmark(group="models")
def test_inference(benchmark, setting, model, batch, inference_dtype):
    name, size = model
    network, x = calibrated(name, size), torch.randn(batch, 3, size, size)
    calls, exact = suite.contenders(setting, network, x, "forward", inference_dtype)
    if setting.device.type == "cpu" and inference_dtype != torch.float16:
        calls |= engines(network, x, inference_dtype)
    suite.compare(benchmark, setting, calls, exact)


@pytest.mark.benchmark(group="training step")
def test_training_step(benchmark, setting, model, dtype):
    name, size = model
    x = torch.randn(suite.BATCH, 3, size, size)
    network = getattr(torchvision.models, name)()
    suite.compare(benchmark, setting, *suite.contenders(setting, network, x, "step", dtype))
