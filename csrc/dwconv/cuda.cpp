// effkernels::dwconv on CUDA: plans, allocates, launches.
#include "dwconv/cuda_tensor.h"
#include "dwconv/tiles.h"

namespace effk::dwconv {
namespace {

std::tuple<Tensor, Tensor> dwconv(
    Tensor x, Tensor weight, std::optional<Tensor> mean1, std::optional<Tensor> var1, std::optional<Tensor> gamma1,
    std::optional<Tensor> beta1, double eps1, int64_t act1, std::optional<Tensor> mean2, std::optional<Tensor> var2,
    std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2, int64_t stride,
    int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w, int64_t reduce) {
  const ChannelVectors prologue({mean1, var1, gamma1, beta1}, eps1, act1, x.size(1), x);
  const ChannelVectors epilogue({mean2, var2, gamma2, beta2}, eps2, act2, x.size(1), x);
  const DeviceGuard guard(x.get_device_index());
  Problem q = make_problem(x, weight, prologue.transform, epilogue.transform, stride, pad_top, pad_left);
  q.reduce = reduce_of(reduce);
  q.channels_last = is_channels_last(x);

  Tensor y = empty_map(x, {q.x.n, q.x.c, out_h, out_w});
  if (y.numel() == 0) return {y, undefined_sums(x, q.reduce)};
  q.y = map_of(y, "y");
  Plan plan = make_plan(q, *choose_tile(q));
  Tensor sums = empty_sums(x, q.reduce), workspace = empty_floats(x, {plan.workspace_floats});
  plan.reduce_into(static_cast<float*>(sums.data_ptr()), static_cast<float*>(workspace.data_ptr()));
  execute(plan, current_stream(x));
  return {y, sums};
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) { m.impl("dwconv.cuda", TORCH_BOX(&dwconv)); }

}  // namespace
}  // namespace effk::dwconv
