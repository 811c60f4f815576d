// Runs a pass over a map. For cuda.cpp files.
#pragma once

#include "common/cuda_tensor.h"
#include "map_pass/plan.h"

namespace effk::map_pass {

inline Problem make_problem(const Tensor& x) {
  Problem q{};
  q.x = q.y = map_of(x, "x");
  q.y.data = nullptr;
  q.dtype = kernel_dtype(x, "x");
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
  execute(plan, current_stream(x));
  return sums;
}

}  // namespace effk::map_pass
