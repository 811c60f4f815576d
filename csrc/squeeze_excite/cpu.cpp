// effkernels::spatial_mean.cpp, effkernels::se_gate.cpp and effkernels::channel_scale.cpp, squeeze-excite on the CPU.
#include "../map_pass/cpu.h"
#include "cpu_kernel.h"

namespace effk {
namespace {

Tensor spatial_mean(const Tensor& x) {
  return *std::get<1>(map_pass(x, {nullptr, nullptr, kIdentity}, 0, false, Reduce::kMean));
}

Tensor se_gate(const Tensor& pooled, const Tensor& w1, std::optional<Tensor> b1, const Tensor& w2,
               std::optional<Tensor> b2, int64_t act, int64_t gate) {
  const int64_t c = pooled.size(1), r = w1.size(0);
  require(pooled.scalar_type() == statistics_dtype(w1) && w2.scalar_type() == w1.scalar_type(),
          "effkernels::se_gate: the weights must have one dtype, pooled be float32, or float64 as they are");
  require(has_shape(w1, {r, c}) && has_shape(w2, {c, r}), "effkernels::se_gate: w1 must be [R, C], w2 [C, R]");
  for (const auto& [bias, size] : {std::pair(&b1, r), std::pair(&b2, c)})
    require(!*bias || (has_shape(**bias, {size}) && (*bias)->scalar_type() == w1.scalar_type()),
            "effkernels::se_gate: b1 must be [R], b2 [C], of the dtype of the weights");
  // All small: dense copies cost nothing beside a pass over a map.
  auto dense = [](const Tensor& t) { return torch::stable::contiguous(t); };
  const Tensor in = dense(pooled), v1 = dense(w1), v2 = dense(w2);
  const std::optional<Tensor> c1 = b1 ? std::optional(dense(*b1)) : std::nullopt;
  const std::optional<Tensor> c2 = b2 ? std::optional(dense(*b2)) : std::nullopt;
  const Tensor out = empty_matrix(pooled, pooled.size(0), pooled.size(1), pooled.scalar_type());

  SeGateParams p{};
  p.weight_dtype = dtype_of(w1);
  p.weights = {v1.const_data_ptr(), c1 ? c1->const_data_ptr() : nullptr, v2.const_data_ptr(),
               c2 ? c2->const_data_ptr() : nullptr};
  p.pooled = in.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.c = c;
  p.r = r;
  p.activation = static_cast<int32_t>(act);
  p.gate = static_cast<int32_t>(gate);
  EFFK_CPU_FUNCTION(se_gate_plan)(p);
  const size_t element = compute_size(p.weight_dtype);
  p.packed = scratch<0>(p.packed_size * element);
  EFFK_CPU_FUNCTION(se_gate_pack)(p);
  const auto run = EFFK_CPU_FUNCTION(se_gate_run);
  // A few images are less work than waking a thread.
  torch::stable::parallel_for(0, pooled.size(0), 32, [&](int64_t begin, int64_t end) {
    run(p, begin, end, scratch<1>(p.scratch_size * element));
  });
  return out;
}

Tensor channel_scale(const Tensor& x, const Tensor& gate) {
  require(has_shape(gate, {x.size(0), x.size(1)}) && gate.scalar_type() == statistics_dtype(x),
          "effkernels::channel_scale: gate must be [N, C], float32, or float64 where x is");
  const Tensor g = torch::stable::contiguous(gate);
  const Affine affine{g.const_data_ptr(), nullptr, kIdentity};
  return *std::get<0>(map_pass(x, affine, x.size(1), true, Reduce::kNone));
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  m.impl("spatial_mean.cpp", TORCH_BOX(&spatial_mean));
  m.impl("se_gate.cpp", TORCH_BOX(&se_gate));
  m.impl("channel_scale.cpp", TORCH_BOX(&channel_scale));
}

}  // namespace
}  // namespace effk
