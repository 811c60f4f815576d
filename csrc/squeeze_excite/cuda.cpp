// effkernels::spatial_mean, se_gate and channel_scale on CUDA.
#include "squeeze_excite/cuda_tensor.h"

#include "map_pass/cuda_tensor.h"

namespace effk::squeeze_excite {
namespace {

Tensor spatial_mean(Tensor x) {
  map_pass::Problem q = map_pass::make_problem(x);
  q.reduce = Reduce::kMean;
  const DeviceGuard guard(x.get_device_index());
  return x.numel() ? map_pass::run(q, x) : undefined_sums(x, q.reduce);
}

Tensor se_gate(Tensor pooled, Tensor w1, std::optional<Tensor> b1, Tensor w2, std::optional<Tensor> b2, int64_t act,
               int64_t gate_act) {
  require(pooled.dim() == 2 && pooled.scalar_type() == ScalarType::Float, "pooled must be [N, C] in float32");
  const DeviceGuard guard(pooled.get_device_index());
  const GateLayers layers(w1, b1, w2, b2, act, gate_act, pooled.size(1));
  Tensor gates = empty_floats(pooled, {pooled.size(0), pooled.size(1)});
  if (gates.numel() == 0) return gates;
  pooled = dense(pooled);
  const Means means{static_cast<const float*>(pooled.data_ptr()), nullptr, 0};
  const GateLaunch plan = plan_gate(means, static_cast<float*>(gates.data_ptr()), layers.reduce, layers.expand,
                                    pooled.size(0), layers.dtype);
  execute(plan, current_stream(pooled));
  return gates;
}

Tensor channel_scale(Tensor x, Tensor gate) {
  map_pass::Problem q = map_pass::make_problem(x);
  require(gate.dim() == 2 && gate.size(0) == q.x.n && gate.size(1) == q.x.c && gate.scalar_type() == ScalarType::Float,
          "gate must be [N, C] in float32 with the N and C of x");
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_map(x, {q.x.n, q.x.c, q.x.h, q.x.w});
  if (x.numel() == 0) return y;
  gate = dense(gate);
  q.y = map_of(y, "y");
  q.gate = static_cast<const float*>(gate.data_ptr());
  map_pass::run(q, x);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) {
  m.impl("spatial_mean.cuda", TORCH_BOX(&spatial_mean));
  m.impl("se_gate.cuda", TORCH_BOX(&se_gate));
  m.impl("channel_scale.cuda", TORCH_BOX(&channel_scale));
}

}  // namespace
}  // namespace effk::squeeze_excite
