// The 1x1 convolution's launch of PyTorch's tensors. For cuda.cpp files.
#pragma once

#include "common/cuda_tensor.h"
#include "pointwise_inference/plan.h"

namespace effk::pointwise_inference {

// All but the output. `weight` [O, C] or [O, C, 1, 1] and `gate` must outlive the launch, and are made dense. `tf32`:
// float32 is multiplied in it.
inline Problem make_problem(const Tensor& x, Tensor& weight, const Transform& epilogue, std::optional<Tensor>& gate,
                            const std::optional<Tensor>& residual, bool tf32) {
  Problem q{};
  q.x = map_of(x, "x");
  q.dtype = kernel_dtype(x, "x");
  q.tf32 = tf32;
  const bool flat = weight.dim() == 2 || (weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1);
  require(flat && weight.size(1) == q.x.c && weight.scalar_type() == x.scalar_type(),
          "weight must be [O, C] with C = " + std::to_string(q.x.c) + ", in the dtype of x");
  require(!gate || (gate->dim() == 2 && gate->size(0) == q.x.n && gate->size(1) == q.x.c &&
                    gate->scalar_type() == ScalarType::Float),
          "gate must be [N, C] in float32 with the N and C of x");
  if (residual) {
    q.residual = map_of(*residual, "residual");
    require(residual->scalar_type() == x.scalar_type() && q.residual.n == q.x.n && q.residual.c == weight.size(0) &&
                q.residual.h == q.x.h && q.residual.w == q.x.w,
            "residual must be like the output");
  }
  weight = dense(weight);
  gate = dense(gate);
  q.weight = weight.data_ptr();
  q.gate = gate ? static_cast<const float*>(gate->data_ptr()) : nullptr;
  q.epilogue = epilogue;
  return q;
}

}  // namespace effk::pointwise_inference
