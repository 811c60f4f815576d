// The depthwise convolution's launch of PyTorch's tensors. For cuda.cpp files.
#pragma once

#include "common/cuda_tensor.h"
#include "dwconv/plan.h"

namespace effk::dwconv {

// All but the output and its reduction. `weight` must outlive the launch, and is made dense.
inline Problem make_problem(const Tensor& x, Tensor& weight, const Transform& prologue, const Transform& epilogue,
                            int64_t stride, int64_t pad_top, int64_t pad_left) {
  Problem q{};
  q.x = map_of(x, "x");
  q.dtype = kernel_dtype(x, "x");
  const int64_t c = q.x.c, k = weight.dim() == 4 ? weight.size(2) : 0;
  require((k == 3 || k == 5 || k == 7) && weight.size(3) == k && weight.size(1) == 1 && weight.size(0) == c,
          "weight must be [C, 1, k, k] with C = " + std::to_string(c) + " and k in 3, 5, 7");
  require(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  require(stride == 1 || stride == 2, "stride must be 1 or 2, got " + std::to_string(stride));
  require(pad_top >= 0 && pad_left >= 0, "pad_top and pad_left must not be negative");
  weight = dense(weight);
  q.weight = weight.data_ptr();
  q.kernel_size = static_cast<int>(k);
  q.stride = static_cast<int>(stride);
  q.pad_top = to_int32(pad_top, "pad_top");
  q.pad_left = to_int32(pad_left, "pad_left");
  q.prologue = prologue;
  q.epilogue = epilogue;
  return q;
}

}  // namespace effk::dwconv
