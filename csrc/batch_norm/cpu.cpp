// The BatchNorm phases on the CPU.
#include "../map_pass/cpu.h"
#include "cpu_kernel.h"

namespace effk {
namespace {

Tensor bn_statistics(const Tensor& x) {
  return *std::get<1>(map_pass(x, {nullptr, nullptr, kIdentity}, 0, false, Reduce::kStatistics));
}

std::tuple<Tensor, Tensor> bn_apply(const Tensor& x, const Tensor& mean, const Tensor& var, std::optional<Tensor> gamma,
                                    std::optional<Tensor> beta, double eps, int64_t act, int64_t reduce) {
  const FoldedNorm norm(mean, var, gamma, beta, eps, act, dtype_of(x), x.size(1));
  auto [y, sums] = map_pass(x, norm.affine(), 0, true, reduce_of(reduce));
  return {*y, sums ? *sums : empty_vector(x, 0, statistics_dtype(x))};
}

// Runs a pass whose maps and vectors are set. The partial sums stay in this thread's scratch memory.
void run_norm_pass(NormPassParams& p) {
  EFFK_CPU_FUNCTION(norm_pass_plan)(p);
  p.sums = scratch<2>(p.units * p.sums_count * p.padded * compute_size(p.dtype));
  const auto run = EFFK_CPU_FUNCTION(norm_pass_run);
  for_units(p.units, [&](int64_t begin, int64_t end) {
    run(p, begin, end, scratch<1>(p.scratch_size));
  });
}

Tensor bn_pool(const Tensor& x, const Tensor& mean, const Tensor& var, std::optional<Tensor> gamma,
               std::optional<Tensor> beta, double eps, int64_t act, bool slopes) {
  NormPassParams p{};
  p.kind = slopes ? NormPassParams::kPool : NormPassParams::kPoolOnly;
  p.dtype = dtype_of(x);
  p.x = map_of(x);
  const BackwardNormVectors norm(mean, var, gamma, beta, eps, act, std::nullopt, p.dtype, p.x.c);
  p.norm = norm.vectors();
  run_norm_pass(p);
  const int64_t strides[] = {std::max<int64_t>(p.x.n, 1) * p.x.c, p.x.c, 1};
  const Tensor out = empty_strided(x, {p.sums_count, p.x.n, p.x.c}, strides, statistics_dtype(x));
  const double area = static_cast<double>(p.x.h * p.x.w);
  with_compute(p.dtype, [&](auto zero) {
    using C = decltype(zero);
    merge_parts({p.sums, p.x.n, p.bands, p.sums_count, p.padded, p.x.c}, static_cast<C*>(out.mutable_data_ptr()), p.x.c,
                strides[0], 1, [&](int64_t row, int64_t c, double sum) {
                  return row == 0 ? sum / area : row == 2 ? sum * norm.rstd()[c] : sum;
                });
  });
  return out;
}

Tensor bn_residual(const Tensor& x, const Tensor& mean, const Tensor& var, std::optional<Tensor> gamma,
                   std::optional<Tensor> beta, double eps, std::optional<Tensor> scale,
                   std::optional<Tensor> residual) {
  NormPassParams p{};
  p.kind = NormPassParams::kResidual;
  p.dtype = dtype_of(x);
  p.x = map_of(x);
  const BackwardNormVectors norm(mean, var, gamma, beta, eps, kIdentity, std::nullopt, p.dtype, p.x.c);
  p.norm = norm.vectors();
  const auto factor = dense_vector(scale, {p.x.n, p.x.c}, x, "effkernels::bn_residual: scale");
  p.factor = data_of(factor);
  if (residual) p.other = map_like(*residual, x, "effkernels::bn_residual: residual");
  const Tensor y = empty_map(x, {p.x.n, p.x.c, p.x.h, p.x.w}, is_channels_last(x));
  p.y = map_of(y);
  run_norm_pass(p);
  return y;
}

// The parameters of a pass over x and the gradient of act(bn(x)), and what they point to.
struct BackwardPass {
  NormPassParams p{};
  BackwardNormVectors norm;
  std::optional<Tensor> factor, added;

  BackwardPass(const char* op, NormPassParams::Kind kind, const Tensor& grad, const std::optional<Tensor>& scale,
               const std::optional<Tensor>& shift, const Tensor& x, const Tensor& mean, const Tensor& var,
               const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, double eps, int64_t act,
               const std::optional<Tensor>& grad_means)
      : norm(mean, var, gamma, beta, eps, act, grad_means, dtype_of(x), x.size(1)),
        factor(dense_vector(scale, {x.size(0), x.size(1)}, x, (std::string(op) + ": scale").c_str())),
        added(dense_vector(shift, {x.size(0), x.size(1)}, x, (std::string(op) + ": shift").c_str())) {
    p.kind = kind;
    p.dtype = dtype_of(x);
    p.x = map_of(x);
    p.other = map_like(grad, x, (std::string(op) + ": grad").c_str());
    p.norm = norm.vectors();
    p.factor = data_of(factor);
    p.added = data_of(added);
  }
};

Tensor bn_backward_sums(const Tensor& grad, std::optional<Tensor> scale, std::optional<Tensor> shift, const Tensor& x,
                        const Tensor& mean, const Tensor& var, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                        double eps, int64_t act) {
  BackwardPass pass("effkernels::bn_backward_sums", NormPassParams::kBackwardSums, grad, scale, shift, x, mean, var,
                    gamma, beta, eps, act, std::nullopt);
  run_norm_pass(pass.p);
  const Tensor out = empty_matrix(x, 2, pass.p.x.c, statistics_dtype(x));
  with_compute(pass.p.dtype, [&](auto zero) {
    using C = decltype(zero);
    merge_parts({pass.p.sums, 1, pass.p.units, 2, pass.p.padded, pass.p.x.c}, static_cast<C*>(out.mutable_data_ptr()), 0,
                pass.p.x.c, 1,
                [&](int64_t row, int64_t c, double sum) { return row == 1 ? sum * pass.norm.rstd()[c] : sum; });
  });
  return out;
}

Tensor bn_backward(const Tensor& grad, std::optional<Tensor> scale, std::optional<Tensor> shift, const Tensor& x,
                   const Tensor& mean, const Tensor& var, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                   double eps, int64_t act, std::optional<Tensor> grad_means) {
  BackwardPass pass("effkernels::bn_backward", NormPassParams::kBackward, grad, scale, shift, x, mean, var, gamma, beta,
                    eps, act, grad_means);
  const Tensor out = empty_map(x, {pass.p.x.n, pass.p.x.c, pass.p.x.h, pass.p.x.w}, is_channels_last(x));
  pass.p.y = map_of(out);
  run_norm_pass(pass.p);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  m.impl("bn_statistics.cpp", TORCH_BOX(&bn_statistics));
  m.impl("bn_apply.cpp", TORCH_BOX(&bn_apply));
  m.impl("bn_pool.cpp", TORCH_BOX(&bn_pool));
  m.impl("bn_residual.cpp", TORCH_BOX(&bn_residual));
  m.impl("bn_backward_sums.cpp", TORCH_BOX(&bn_backward_sums));
  m.impl("bn_backward.cpp", TORCH_BOX(&bn_backward));
}

}  // namespace
}  // namespace effk
