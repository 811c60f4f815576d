// effkernels::bn_statistics and bn_apply on CUDA: both are one pass over a map.
#include "map_pass/cuda_tensor.h"

namespace effk::batch_norm {
namespace {

Tensor bn_statistics(Tensor x) {
  map_pass::Problem q = map_pass::make_problem(x);
  q.reduce = Reduce::kStatistics;
  const DeviceGuard guard(x.get_device_index());
  return x.numel() ? map_pass::run(q, x) : undefined_sums(x, q.reduce);
}

std::tuple<Tensor, Tensor> bn_apply(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> gamma,
                                    std::optional<Tensor> beta, double eps, int64_t act, int64_t reduce) {
  map_pass::Problem q = map_pass::make_problem(x);
  const ChannelVectors vectors({mean, var, gamma, beta}, eps, act, x.size(1), x);
  q.transform = vectors.transform;
  q.reduce = reduce_of(reduce);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_map(x, {q.x.n, q.x.c, q.x.h, q.x.w});
  if (x.numel() == 0) return {y, undefined_sums(x, q.reduce)};
  q.y = map_of(y, "y");
  return {y, map_pass::run(q, x)};
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) {
  m.impl("bn_statistics.cuda", TORCH_BOX(&bn_statistics));
  m.impl("bn_apply.cuda", TORCH_BOX(&bn_apply));
}

}  // namespace
}  // namespace effk::batch_norm
