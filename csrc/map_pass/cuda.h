// Runs a pass over a map. For cuda.cu files.
#pragma once

#include "common/cuda_launch.h"
#include "map_pass/kernel.cuh"

namespace effk::map_pass {

inline Problem make_problem(const Tensor& x) {
  Problem q{};
  q.x = q.y = map_of(x, "x");
  q.y.data = nullptr;
  q.dtype = dtype_of(x, "x");
  q.channels_last = is_channels_last(x);
  q.transform = make_transform(nullptr, nullptr, nullptr, nullptr, 0, 0, kIdentity);
  q.reduce = Reduce::kNone;
  return q;
}

// `x` must not be empty; the caller holds a DeviceGuard. Returns the sums.
inline Tensor run(const Problem& q, const Tensor& x) {
  Plan plan = make_plan(q);
  Tensor sums = empty_sums(x, q.reduce), workspace = empty_floats(x, {plan.workspace_floats});
  plan.reduce_into(static_cast<float*>(sums.data_ptr()), static_cast<float*>(workspace.data_ptr()));
  with_type(q.dtype, [&](auto type) {
    using T = decltype(type);
    launch(plan.main, q.channels_last ? channels_last<T> : nchw<T>, x);
  });
  if (plan.merge) launch(*plan.merge, merge_moments<kMergeThreads>, x);
  return sums;
}

}  // namespace effk::map_pass
