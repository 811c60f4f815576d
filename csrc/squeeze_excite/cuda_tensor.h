// The gate's launch of PyTorch's tensors. For cuda.cpp files.
#pragma once

#include "common/cuda_tensor.h"
#include "squeeze_excite/plan.h"

namespace effk::squeeze_excite {

// The two layers of a gate of `channels`: matrices [R, C] and [C, R], or such of 1x1 convolutions, and biases. They are
// small: strided ones are copied, and kept here.
class GateLayers {
 public:
  GateLayers(const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2, const std::optional<Tensor>& b2,
             int64_t act, int64_t gate_act, int64_t channels)
      : w1_(dense(w1)), w2_(dense(w2)), b1_(dense(b1)), b2_(dense(b2)) {
    dtype = kernel_dtype(w1, "reduce_weight");
    const int64_t r = w1.dim() >= 2 ? w1.size(0) : 0;
    const auto is_matrix = [](const Tensor& w, int64_t rows, int64_t columns) {
      return w.dim() >= 2 && w.size(0) == rows && w.size(1) == columns && w.numel() == rows * columns;
    };
    require(is_matrix(w1, r, channels) && is_matrix(w2, channels, r),
            "reduce_weight must be [R, C] and expand_weight [C, R] with C = " + std::to_string(channels));
    const auto matches = [&](const std::optional<Tensor>& b, int64_t size) {
      return !b || (b->dim() == 1 && b->size(0) == size && b->scalar_type() == w1.scalar_type());
    };
    require(w2.scalar_type() == w1.scalar_type() && matches(b1, r) && matches(b2, channels),
            "expand_weight and biases [R] and [C] must have the dtype of reduce_weight");
    reduce = layer(w1_, b1_, act);
    expand = layer(w2_, b2_, gate_act);
  }

  Dtype dtype;
  Layer reduce, expand;

 private:
  Layer layer(const Tensor& w, const std::optional<Tensor>& b, int64_t activation) const {
    return make_layer(w.data_ptr(), b ? b->data_ptr() : nullptr, to_int32(w.size(0), "rows of a weight"),
                      to_int32(w.size(1), "columns of a weight"), static_cast<int>(activation), dtype);
  }

  Tensor w1_, w2_;
  std::optional<Tensor> b1_, b2_;
};

}  // namespace effk::squeeze_excite
