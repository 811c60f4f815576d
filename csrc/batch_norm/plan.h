// BatchNorm's backward, one pass over the gradient of act(bn(x)) and x: either the gradients of the BatchNorm's
// parameters, or that of x.
#pragma once

#include "common/partial_sums.h"
#include "map_pass/plan.h"

namespace effk::batch_norm {

using map_pass::Items;
using map_pass::kMaxThreads;

// Channels of an item in channels_last: what is known of each stays in registers.
constexpr int kChannels = 4;

struct Instance {
  bool channels_last;
  Dtype dtype;
};

inline std::string kernel_name(const Instance& i) {
  return std::string("effk::batch_norm::") + (i.channels_last ? "channels_last<" : "nchw<") + cuda_name(i.dtype) + ">";
}

struct Problem {
  Map grad, x, grad_x;  // grad_x.data is null where the sums are wanted
  Dtype dtype;
  bool channels_last;  // the layout of x
  BackwardTransform transform;
};

struct Params {
  const void *grad, *x;
  void* grad_x;  // null: sums only
  Strides grad_stride, x_stride, grad_x_stride;
  BackwardTransform transform;
  PartialSums sums;  // of dz and of dz * xhat [2, C]
  Items items;
  bool grad_aligned, x_aligned, grad_x_aligned;  // channels_last: whether an item is one access; in NCHW it always is
};

using Plan = SummingPlan<Instance, Params>;


// A problem must not be empty.
inline Plan make_plan(const Problem& q) {
  Map grad = q.grad, x = q.x, grad_x = q.grad_x;
  const int vector = q.channels_last ? kChannels : kVectorBytes / size_of(q.dtype);
  const map_pass::Cut c = map_pass::cut({&grad, &x, &grad_x}, q.dtype, q.channels_last, vector);
  const bool sums = !grad_x.data;
  Plan plan;
  Params& p = plan.main.params = Params{};
  p.grad = grad.data;
  p.x = x.data;
  p.grad_x = const_cast<void*>(grad_x.data);
  p.grad_stride = strides_of(grad);
  p.x_stride = strides_of(x);
  p.grad_x_stride = strides_of(grad_x);
  p.transform = q.transform;
  p.items = c.items;
  const auto aligned = [&](const Map& map) { return !q.channels_last || vectorizes(map, q.dtype, true, kChannels); };
  p.grad_aligned = aligned(grad);
  p.x_aligned = aligned(x);
  p.grad_x_aligned = aligned(grad_x);
  plan.main.instance = {q.channels_last, q.dtype};
  plan.main.grid = unsigned(to_int32(c.blocks, "the number of blocks"));
  plan.main.block = unsigned(c.threads);
  plan.main.shared_bytes = sums ? unsigned(c.items.members * (c.items.group | 1) * sizeof(float)) : 0;
  plan.sum(to_int32(int64_t{c.items.n} * c.items.parts, "the number of partial sums"), 0, sums ? 2 * c.items.c : 0);
  return plan;
}

void execute(const Plan& plan, Stream stream);  // cuda_kernel.cu

}  // namespace effk::batch_norm
