// effkernels::spatial_mean, se_gate and channel_scale on CUDA.
#include "map_pass/cuda_tensor.h"
#include "squeeze_excite/plan.h"

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
  const int64_t n = pooled.size(0), c = pooled.size(1), r = w1.dim() == 2 ? w1.size(0) : 0;
  require(w1.dim() == 2 && w1.size(1) == c && w2.dim() == 2 && w2.size(0) == c && w2.size(1) == r,
          "reduce_weight must be [R, C] and expand_weight [C, R] with C = " + std::to_string(c));
  const Dtype dtype = kernel_dtype(w1, "reduce_weight");
  const auto matches = [&](const std::optional<Tensor>& b, int64_t size) {
    return !b || (b->dim() == 1 && b->size(0) == size && b->scalar_type() == w1.scalar_type());
  };
  require(w2.scalar_type() == w1.scalar_type() && matches(b1, r) && matches(b2, c),
          "expand_weight and biases [R] and [C] must have the dtype of reduce_weight");

  const DeviceGuard guard(pooled.get_device_index());
  Tensor gates = empty_floats(pooled, {n, c});
  if (gates.numel() == 0) return gates;
  pooled = dense(pooled);
  w1 = dense(w1);
  w2 = dense(w2);
  b1 = dense(b1);
  b2 = dense(b2);
  const auto layer = [&](const Tensor& w, const std::optional<Tensor>& b, int64_t activation) {
    return make_layer(w.data_ptr(), b ? b->data_ptr() : nullptr, to_int32(w.size(0), "rows of a weight"),
                      to_int32(w.size(1), "columns of a weight"), static_cast<int>(activation), dtype);
  };
  const GateLaunch plan = plan_gate(static_cast<const float*>(pooled.data_ptr()), static_cast<float*>(gates.data_ptr()),
                                    layer(w1, b1, act), layer(w2, b2, gate_act), n, dtype);
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
