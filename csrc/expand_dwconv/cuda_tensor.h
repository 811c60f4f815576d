// The launch of PyTorch's tensors. For cuda.cpp files.
#pragma once

#include "common/cuda_tensor.h"
#include "expand_dwconv/plan.h"

namespace effk::expand_dwconv {

// All but the reduction and the memory of d, which is dense in channels_last. The weights, `expand` [hidden, C] or
// [hidden, C, 1, 1] and `depthwise` [hidden, 1, k, k], must outlive the launch, and are made dense. The caller
// holds a DeviceGuard, and says if float32 is multiplied in TF32.
inline Problem make_problem(const Tensor& x, Tensor& expand, const Transform& norm1, Tensor& depthwise,
                            const Transform& norm2, int64_t stride, int64_t pad_top, int64_t pad_left, int64_t out_h,
                            int64_t out_w, bool tf32) {
  Problem q{};
  q.x = map_of(x, "x");
  q.dtype = kernel_dtype(x, "x");
  q.tf32 = tf32;
  const int64_t hidden = expand.dim() >= 2 ? expand.size(0) : 0, k = depthwise.dim() == 4 ? depthwise.size(2) : 0;
  require(hidden > 0 && expand.size(1) == q.x.c && expand.numel() == hidden * q.x.c,
          "expand must be [hidden, C] with C = " + std::to_string(q.x.c));
  require((k == 3 || k == 5 || k == 7) && depthwise.size(3) == k && depthwise.size(1) == 1 &&
              depthwise.size(0) == hidden,
          "depthwise must be [hidden, 1, k, k] with hidden = " + std::to_string(hidden) + " and k in 3, 5, 7");
  require(expand.scalar_type() == x.scalar_type() && depthwise.scalar_type() == x.scalar_type(),
          "expand and depthwise must have the dtype of x");
  require(stride == 1 || stride == 2, "stride must be 1 or 2, got " + std::to_string(stride));
  require(pad_top >= 0 && pad_left >= 0, "pad_top and pad_left must not be negative");
  expand = dense(expand);
  depthwise = dense(depthwise);
  q.expand = expand.data_ptr();
  q.depthwise = depthwise.data_ptr();
  q.kernel_size = static_cast<int>(k);
  q.stride = static_cast<int>(stride);
  q.pad_top = to_int32(pad_top, "pad_top");
  q.pad_left = to_int32(pad_left, "pad_left");
  q.norm1 = norm1;
  q.norm2 = norm2;
  q.gpu = current_gpu();
  q.d = {nullptr, q.x.n, hidden, out_h, out_w, out_h * out_w * hidden, 1, out_w * hidden, hidden};
  return q;
}

}  // namespace effk::expand_dwconv
