// effkernels::dwconv_backward and expand_dwconv_backward on CUDA: plan, allocate, launch.
#include "dwconv/cuda_tensor.h"
#include "dwconv_backward/tiles.h"
#include "expand_dwconv/cuda_tensor.h"

namespace effk::dwconv_backward {
namespace {

// Of the backward of `forward`, a problem without an output.
template <class Forward>
Problem make_problem(const Forward& forward, const void* weight, const BackwardVectors& after,
                     const ChannelVectors& before, bool need_weight) {
  Problem q{};
  q.dtype = forward.dtype;
  q.weight = weight;
  q.kernel_size = forward.kernel_size;
  q.stride = forward.stride;
  q.pad_top = forward.pad_top;
  q.pad_left = forward.pad_left;
  q.after = after.transform;
  q.before = before.transform;
  q.need_weight = need_weight;
  return q;
}

// x is the map that is read: q.x, or what that is the expansion of.
std::tuple<Tensor, Tensor, Tensor> run(Problem& q, const Tensor& grad, const Tensor& y, const Tensor& x,
                                       bool need_input) {
  q.grad = map_of(grad, "grad");
  q.y = map_of(y, "y");
  for (const Tensor* t : {&grad, &y})
    require(t->scalar_type() == x.scalar_type() && t->size(0) == q.x.n && t->size(1) == q.x.c &&
                t->size(2) == q.y.h && t->size(3) == q.y.w,
            "grad and y must have the same shape, the batch and dtype of x, and the channels of weight");
  const int64_t c = q.x.c, k = q.kernel_size;
  Tensor grad_norm =
      need_input ? empty_map(x, {q.x.n, c, q.x.h, q.x.w}, q.channels_last) : torch::stable::new_empty(x, {0});
  Tensor grad_weight = q.need_weight ? empty_floats(x, {c, 1, k, k}) : empty_floats(x, {0});
  Tensor sums = need_input && q.before.mean ? empty_floats(x, {2, c}) : empty_floats(x, {0});
  if (x.numel() == 0) {
    torch::stable::fill_(grad_weight, 0);
    torch::stable::fill_(sums, 0);
    return {grad_norm, grad_weight, sums};
  }
  if (need_input) q.grad_norm = map_of(grad_norm, "grad_norm");
  const std::optional<Tile> tile = choose_tile(q);
  require(tile.has_value(), std::to_string(q.narrow.c) + " channels of x do not fit this GPU's shared memory");
  Plan plan = make_plan(q, *tile);
  Tensor workspace = empty_floats(x, {plan.workspace_floats});
  plan.sum_into(floats_of(grad_weight), floats_of(sums), floats_of(workspace));
  (q.expands ? execute_expanding : execute)(plan, current_stream(x));
  return {grad_norm, grad_weight, sums};
}

std::tuple<Tensor, Tensor, Tensor> dwconv_backward(
    Tensor grad, std::optional<Tensor> scale, std::optional<Tensor> shift, Tensor y, Tensor mean2, Tensor var2,
    std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2,
    std::optional<Tensor> grad_means, Tensor weight, Tensor x, std::optional<Tensor> mean1, std::optional<Tensor> var1,
    std::optional<Tensor> gamma1, std::optional<Tensor> beta1, double eps1, int64_t act1, int64_t stride,
    int64_t pad_top, int64_t pad_left, bool need_input, bool need_weight) {
  const BackwardVectors after({mean2, var2, gamma2, beta2}, eps2, act2, scale, shift, grad_means, x);
  const ChannelVectors before({mean1, var1, gamma1, beta1}, eps1, act1, x.size(1), x);
  const DeviceGuard guard(x.get_device_index());
  const dwconv::Problem forward =
      dwconv::make_problem(x, weight, before.transform, Transform{}, stride, pad_top, pad_left);
  Problem q = make_problem(forward, forward.weight, after, before, need_weight);
  q.x = forward.x;
  q.channels_last = is_channels_last(x);
  return run(q, grad, y, x, need_input);
}

std::tuple<Tensor, Tensor, Tensor> expand_dwconv_backward(
    Tensor grad, std::optional<Tensor> scale, std::optional<Tensor> shift, Tensor y, Tensor mean2, Tensor var2,
    std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2,
    std::optional<Tensor> grad_means, Tensor weight, Tensor x, Tensor expand, Tensor mean1, Tensor var1,
    std::optional<Tensor> gamma1, std::optional<Tensor> beta1, double eps1, int64_t act1, int64_t stride,
    int64_t pad_top, int64_t pad_left, bool need_input, bool need_weight) {
  const BackwardVectors after({mean2, var2, gamma2, beta2}, eps2, act2, scale, shift, grad_means, y);
  const ChannelVectors before({mean1, var1, gamma1, beta1}, eps1, act1, y.size(1), x);
  const DeviceGuard guard(x.get_device_index());
  const expand_dwconv::Problem forward = expand_dwconv::make_problem(
      x, expand, before.transform, weight, Transform{}, stride, pad_top, pad_left, y.size(2), y.size(3), false);
  Problem q = make_problem(forward, forward.depthwise, after, before, need_weight);
  q.x = {nullptr, forward.x.n, forward.d.c, forward.x.h, forward.x.w, 0, 0, 0, 0};
  q.channels_last = q.expands = true;
  q.narrow = forward.x;
  q.expand = forward.expand;
  q.max_shared = forward.gpu.shared_per_block;
  return run(q, grad, y, x, need_input);
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) {
  m.impl("dwconv_backward.cuda", TORCH_BOX(&dwconv_backward));
  m.impl("expand_dwconv_backward.cuda", TORCH_BOX(&expand_dwconv_backward));
}

}  // namespace
}  // namespace effk::dwconv_backward
