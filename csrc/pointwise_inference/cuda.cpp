// effkernels::pointwise_inference on CUDA: plans, allocates, launches.
#include "pointwise_inference/cuda_tensor.h"
#include "pointwise_inference/tiles.h"

namespace effk::pointwise_inference {
namespace {

Tensor pointwise_inference(Tensor x, Tensor weight, std::optional<Tensor> mean, std::optional<Tensor> var,
                           std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps, int64_t act,
                           std::optional<Tensor> gate, std::optional<Tensor> residual) {
  const ChannelVectors vectors({mean, var, gamma, beta}, eps, act, weight.size(0), x);
  const DeviceGuard guard(x.get_device_index());
  Problem q = make_problem(x, weight, vectors.transform, gate, residual, multiplies_in_tf32(x));
  Tensor y = empty_map(x, {q.x.n, weight.size(0), q.x.h, q.x.w});
  if (y.numel() == 0) return y;
  q.y = map_of(y, "y");
  execute(make_plan(q, *choose_tile(q)), current_stream(x));
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) { m.impl("pointwise_inference.cuda", TORCH_BOX(&pointwise_inference)); }

}  // namespace
}  // namespace effk::pointwise_inference
