// effkernels::dwconv on CUDA: plans, allocates, launches.
#include "common/cuda_tensor.h"
#include "dwconv/plan.h"

namespace effk::dwconv {
namespace {

std::tuple<Tensor, Tensor> dwconv(
    Tensor x, Tensor weight, std::optional<Tensor> mean1, std::optional<Tensor> var1, std::optional<Tensor> gamma1,
    std::optional<Tensor> beta1, double eps1, int64_t act1, std::optional<Tensor> mean2, std::optional<Tensor> var2,
    std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2, int64_t stride,
    int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w, int64_t reduce) {
  Problem q{};
  q.x = map_of(x, "x");
  q.dtype = kernel_dtype(x, "x");
  const int64_t c = q.x.c, k = weight.dim() == 4 ? weight.size(2) : 0;
  require((k == 3 || k == 5 || k == 7) && weight.size(3) == k && weight.size(1) == 1 && weight.size(0) == c,
          "weight must be [C, 1, k, k] with C = " + std::to_string(c) + " and k in 3, 5, 7");
  require(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  require(stride == 1 || stride == 2, "stride must be 1 or 2, got " + std::to_string(stride));
  require(pad_top >= 0 && pad_left >= 0, "pad_top and pad_left must not be negative");
  const ChannelVectors prologue({mean1, var1, gamma1, beta1}, eps1, act1, x);
  const ChannelVectors epilogue({mean2, var2, gamma2, beta2}, eps2, act2, x);
  q.reduce = reduce_of(reduce);

  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_map(x, {q.x.n, c, out_h, out_w});
  if (y.numel() == 0) return {y, undefined_sums(x, q.reduce)};
  q.y = map_of(y, "y");
  if (!weight.is_contiguous()) weight = torch::stable::contiguous(weight);
  q.weight = weight.data_ptr();
  q.kernel_size = static_cast<int>(k);
  q.stride = static_cast<int>(stride);
  q.pad_top = to_int32(pad_top, "pad_top");
  q.pad_left = to_int32(pad_left, "pad_left");
  q.prologue = prologue.transform;
  q.epilogue = epilogue.transform;
  q.channels_last = is_channels_last(x);

  Plan plan = make_plan(q);
  Tensor sums = empty_sums(x, q.reduce), workspace = empty_floats(x, {plan.workspace_floats});
  plan.reduce_into(static_cast<float*>(sums.data_ptr()), static_cast<float*>(workspace.data_ptr()));
  execute(plan, current_stream(x));
  return {y, sums};
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CUDA, m) { m.impl("dwconv.cuda", TORCH_BOX(&dwconv)); }

}  // namespace
}  // namespace effk::dwconv
