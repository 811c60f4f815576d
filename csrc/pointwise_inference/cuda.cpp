// effkernels::pointwise_inference on CUDA: plans, allocates, launches.
#include "common/cuda_tensor.h"
#include "pointwise_inference/plan.h"

namespace effk::pointwise_inference {
namespace {

Tensor pointwise_inference(Tensor x, Tensor weight, std::optional<Tensor> mean, std::optional<Tensor> var,
                           std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps, int64_t act,
                           std::optional<Tensor> gate, std::optional<Tensor> residual) {
  Problem q{};
  q.x = map_of(x, "x");
  q.dtype = kernel_dtype(x, "x");
  require(weight.dim() == 2 && weight.size(1) == q.x.c && weight.scalar_type() == x.scalar_type(),
          "weight must be [O, C] with C = " + std::to_string(q.x.c) + ", in the dtype of x");
  require(!gate || (gate->dim() == 2 && gate->size(0) == q.x.n && gate->size(1) == q.x.c &&
                    gate->scalar_type() == ScalarType::Float),
          "gate must be [N, C] in float32 with the N and C of x");

  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_map(x, {q.x.n, weight.size(0), q.x.h, q.x.w});
  const ChannelVectors vectors({mean, var, gamma, beta}, eps, act, y);
  if (residual) {
    q.residual = map_of(*residual, "residual");
    require(residual->scalar_type() == x.scalar_type() && q.residual.n == q.x.n && q.residual.c == weight.size(0) &&
                q.residual.h == q.x.h && q.residual.w == q.x.w,
            "residual must be like the output");
  }
  if (y.numel() == 0) return y;
  weight = dense(weight);
  gate = dense(gate);
  q.y = map_of(y, "y");
  q.weight = weight.data_ptr();
  q.gate = gate ? static_cast<const float*>(gate->data_ptr()) : nullptr;
  q.epilogue = vectors.transform;
  execute(make_plan(q), current_stream(x));
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) { m.impl("pointwise_inference.cuda", TORCH_BOX(&pointwise_inference)); }

}  // namespace
}  // namespace effk::pointwise_inference
