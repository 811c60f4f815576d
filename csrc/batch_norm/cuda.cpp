// The BatchNorm phases on CUDA, each one pass.
#include "batch_norm/plan.h"
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

// The sums [2, C], or where it is given, `grad_x`.
Tensor backward(const Tensor& grad, const Tensor& x, const BackwardVectors& vectors, const Tensor* grad_x) {
  Problem q{};
  q.grad = map_of(grad, "grad");
  q.x = map_of(x, "x");
  require(grad.scalar_type() == x.scalar_type() && q.grad.n == q.x.n && q.grad.c == q.x.c && q.grad.h == q.x.h &&
              q.grad.w == q.x.w,
          "grad must have the shape and dtype of x");
  q.grad_x = grad_x ? map_of(*grad_x) : q.x;
  if (!grad_x) q.grad_x.data = nullptr;
  q.dtype = kernel_dtype(x, "x");
  q.channels_last = is_channels_last(x);
  q.transform = vectors.transform;
  const DeviceGuard guard(x.get_device_index());
  Tensor sums = empty_floats(x, {grad_x ? 0 : 2, q.x.c});
  if (x.numel() == 0) {
    torch::stable::fill_(sums, 0);
    return sums;
  }
  Plan plan = make_plan(q);
  Tensor workspace = empty_floats(x, {plan.workspace_floats});
  plan.sum_into(nullptr, floats_of(sums), floats_of(workspace));
  execute(plan, current_stream(x));
  return sums;
}

Tensor bn_backward_sums(Tensor grad, std::optional<Tensor> scale, std::optional<Tensor> shift, Tensor x, Tensor mean,
                        Tensor var, std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps, int64_t act) {
  const BackwardVectors vectors({mean, var, gamma, beta}, eps, act, scale, shift, std::nullopt, x);
  return backward(grad, x, vectors, nullptr);
}

Tensor bn_backward(Tensor grad, std::optional<Tensor> scale, std::optional<Tensor> shift, Tensor x, Tensor mean,
                   Tensor var, std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps, int64_t act,
                   std::optional<Tensor> grad_means) {
  const BackwardVectors vectors({mean, var, gamma, beta}, eps, act, scale, shift, grad_means, x);
  Tensor grad_x = empty_map(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  backward(grad, x, vectors, &grad_x);
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) {
  m.impl("bn_statistics.cuda", TORCH_BOX(&bn_statistics));
  m.impl("bn_apply.cuda", TORCH_BOX(&bn_apply));
  m.impl("bn_backward_sums.cuda", TORCH_BOX(&bn_backward_sums));
  m.impl("bn_backward.cuda", TORCH_BOX(&bn_backward));
}

}  // namespace
}  // namespace effk::batch_norm
