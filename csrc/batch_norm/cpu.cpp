// effkernels::bn_statistics.cpp and effkernels::bn_apply.cpp, BatchNorm on the CPU.
#include "../map_pass/cpu.h"

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

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  m.impl("bn_statistics.cpp", TORCH_BOX(&bn_statistics));
  m.impl("bn_apply.cpp", TORCH_BOX(&bn_apply));
}

}  // namespace
}  // namespace effk
