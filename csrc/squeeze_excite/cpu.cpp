// effkernels::spatial_mean.cpp, se_gate.cpp, se_gate_backward.cpp and channel_scale.cpp, squeeze-excite on the CPU.
#include "../map_pass/cpu.h"
#include "cpu_kernel.h"

namespace effk {
namespace {

Tensor spatial_mean(const Tensor& x) {
  return *std::get<1>(map_pass(x, {nullptr, nullptr, kIdentity}, 0, false, Reduce::kMean));
}

// The two layers of a gate of C channels, dense. All are small: copies cost nothing beside a pass over a map.
class DenseGate {
 public:
  DenseGate(const char* op, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
            const std::optional<Tensor>& b2, const Tensor& like, int64_t c)
      : w1_(torch::stable::contiguous(w1)), w2_(torch::stable::contiguous(w2)), b1_(dense(b1)), b2_(dense(b2)) {
    const int64_t r = w1.size(0);
    const std::string name(op);
    require(like.scalar_type() == statistics_dtype(w1) && w2.scalar_type() == w1.scalar_type(),
            name + ": the weights must have one dtype, pooled be float32, or float64 as they are");
    require(has_shape(w1, {r, c}) && has_shape(w2, {c, r}), name + ": w1 must be [R, C], w2 [C, R]");
    for (const auto& [bias, size] : {std::pair(&b1, r), std::pair(&b2, c)})
      require(!*bias || (has_shape(**bias, {size}) && (*bias)->scalar_type() == w1.scalar_type()),
              name + ": b1 must be [R], b2 [C], of the dtype of the weights");
  }

  GateWeights weights() const { return {w1_.const_data_ptr(), data_of(b1_), w2_.const_data_ptr(), data_of(b2_)}; }

 private:
  static std::optional<Tensor> dense(const std::optional<Tensor>& t) {
    return t ? std::optional(torch::stable::contiguous(*t)) : std::nullopt;
  }

  Tensor w1_, w2_;
  std::optional<Tensor> b1_, b2_;
};

Tensor se_gate(const Tensor& pooled, const Tensor& w1, std::optional<Tensor> b1, const Tensor& w2,
               std::optional<Tensor> b2, int64_t act, int64_t gate) {
  const int64_t c = pooled.size(1), r = w1.size(0);
  const DenseGate layers("effkernels::se_gate", w1, b1, w2, b2, pooled, c);
  const Tensor in = torch::stable::contiguous(pooled);
  const Tensor out = empty_matrix(pooled, pooled.size(0), c, pooled.scalar_type());

  SeGateParams p{};
  p.weight_dtype = dtype_of(w1);
  p.weights = layers.weights();
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_gate_backward(
    const Tensor& grad, const Tensor& gates, const Tensor& pooled, const Tensor& w1, std::optional<Tensor> b1,
    const Tensor& w2, int64_t act, int64_t gate, int64_t area) {
  const int64_t rows = grad.size(0), n = gates.size(0), c = gates.size(1), r = w1.size(0);
  const DenseGate layers("effkernels::se_gate_backward", w1, b1, w2, std::nullopt, gates, c);
  require(rows == 1 || rows == 3, "effkernels::se_gate_backward: grad must be [1 or 3, N, C]");
  const auto of_images = dense_vector(grad, {rows, n, c}, gates, "effkernels::se_gate_backward: grad");
  const auto means = dense_vector(pooled, {rows, n, c}, gates, "effkernels::se_gate_backward: pooled");
  const Tensor values = torch::stable::contiguous(gates);
  const Tensor shift = empty_matrix(gates, n, c, gates.scalar_type());
  const Tensor sums = empty_matrix(gates, rows - 1, c, gates.scalar_type());
  const Tensor grad_w1 = empty_matrix(gates, r, c, w1.scalar_type()), grad_b1 = empty_vector(gates, r, w1.scalar_type());
  const Tensor grad_w2 = empty_matrix(gates, c, r, w1.scalar_type()), grad_b2 = empty_vector(gates, c, w1.scalar_type());

  SeGateBackwardParams p{};
  p.weight_dtype = dtype_of(w1);
  p.weights = layers.weights();
  p.grad = data_of(of_images);
  p.gates = values.const_data_ptr();
  p.pooled = data_of(means);
  p.n = n;
  p.c = c;
  p.r = r;
  p.activation = static_cast<int32_t>(act);
  p.gate = static_cast<int32_t>(gate);
  p.area = static_cast<double>(area);
  p.shift = shift.mutable_data_ptr();
  p.sums = rows == 3 ? sums.mutable_data_ptr() : nullptr;
  p.grad_w1 = grad_w1.mutable_data_ptr();
  p.grad_b1 = grad_b1.mutable_data_ptr();
  p.grad_w2 = grad_w2.mutable_data_ptr();
  p.grad_b2 = grad_b2.mutable_data_ptr();
  EFFK_CPU_FUNCTION(se_gate_backward_plan)(p);
  p.scratch = scratch<0>(p.scratch_size);
  constexpr int64_t kGrain = 128 << 10;  // multiplications: fewer are done before a thread wakes
  const auto share = [&](int64_t count, int64_t each, auto run) {
    torch::stable::parallel_for(0, count, std::max<int64_t>(kGrain / std::max<int64_t>(each, 1), 1),
                                [&](int64_t begin, int64_t end) { run(p, begin, end); });
  };
  share(n, 2 * c * r, EFFK_CPU_FUNCTION(se_gate_backward_images));
  share(c, 3 * n * r, EFFK_CPU_FUNCTION(se_gate_backward_channels));
  return {shift, sums, grad_w1, grad_b1, grad_w2, grad_b2};
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
  m.impl("se_gate_backward.cpp", TORCH_BOX(&se_gate_backward));
  m.impl("channel_scale.cpp", TORCH_BOX(&channel_scale));
}

}  // namespace
}  // namespace effk
