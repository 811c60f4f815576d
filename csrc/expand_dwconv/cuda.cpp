// effkernels::expand_dwconv on CUDA: plans, allocates, launches.
#include "expand_dwconv/cuda_tensor.h"
#include "expand_dwconv/tiles.h"

namespace effk::expand_dwconv {
namespace {

std::tuple<Tensor, Tensor> expand_dwconv(
    Tensor x, Tensor expand, std::optional<Tensor> mean1, std::optional<Tensor> var1, std::optional<Tensor> gamma1,
    std::optional<Tensor> beta1, double eps1, int64_t act1, Tensor depthwise, std::optional<Tensor> mean2,
    std::optional<Tensor> var2, std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2,
    int64_t stride, int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w, int64_t reduce) {
  const int64_t hidden = depthwise.size(0);
  const ChannelVectors norm1({mean1, var1, gamma1, beta1}, eps1, act1, hidden, x);
  const ChannelVectors norm2({mean2, var2, gamma2, beta2}, eps2, act2, hidden, x);
  const DeviceGuard guard(x.get_device_index());
  // Statistics are asked for in training, which expands again on its way back, in float32.
  const bool tf32 = reduce_of(reduce) != Reduce::kStatistics && multiplies_in_tf32(x);
  Problem q = make_problem(x, expand, norm1.transform, depthwise, norm2.transform, stride, pad_top, pad_left, out_h,
                           out_w, tf32);
  q.reduce = reduce_of(reduce);

  Tensor d = empty_map(x, {q.x.n, hidden, out_h, out_w}, true);
  if (d.numel() == 0) return {d, undefined_sums(d, q.reduce)};
  q.d.data = d.data_ptr();
  const std::optional<Tile> tile = choose_tile(q);
  require(tile.has_value(), std::to_string(q.x.c) + " channels of x do not fit this GPU's shared memory");
  Plan plan = make_plan(q, *tile);
  Tensor sums = empty_sums(d, q.reduce), workspace = empty_floats(x, {plan.workspace_floats});
  plan.reduce_into(static_cast<float*>(sums.data_ptr()), static_cast<float*>(workspace.data_ptr()));
  execute(plan, current_stream(x));
  return {d, sums};
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) { m.impl("expand_dwconv.cuda", TORCH_BOX(&expand_dwconv)); }

}  // namespace
}  // namespace effk::expand_dwconv
