// What the CPU's and the GPU's registrations ask of PyTorch's tensors (stable ABI).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/layout.h"
#include "common/types.h"

namespace effk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What only a caller of the dispatcher's ops can get wrong: the public functions check with better words.
inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline Dtype dtype_of(const Tensor& tensor, const char* name = "x") {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Double: return Dtype::kFloat64;
    default: throw std::invalid_argument(std::string(name) + " must be float32, float16, bfloat16 or float64");
  }
}

inline Map map_of(const Tensor& t, const char* name = "x") {
  require(t.dim() == 4, std::string(name) + " must be [N, C, H, W], got " + std::to_string(t.dim()) + " dimensions");
  const auto size = t.sizes(), stride = t.strides();
  return {t.const_data_ptr(), size[0], size[1], size[2], size[3], stride[0], stride[1], stride[2], stride[3]};
}

inline bool is_channels_last(const Tensor& t) { return is_channels_last(t.sizes().data(), t.strides().data()); }

inline Reduce reduce_of(int64_t code) {
  require(code >= 0 && code <= 2, "reduce must be 0 (none), 1 (mean) or 2 (statistics), got " + std::to_string(code));
  return static_cast<Reduce>(code);
}

}  // namespace effk
