// From torch tensors to a launch plan, and from the plan to the GPU. For cuda.cu files.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/launch.h"
#include "common/layout.h"
#include "common/transform.h"

namespace effk {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      throw std::invalid_argument(std::string(name) + " must be float32, float16 or bfloat16 on the cuda backend");
  }
}

// Calls f with a value of the storage type.
template <class F>
auto with_type(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  if (dtype == Dtype::kFloat16) return f(__half{});
  return f(__nv_bfloat16{});
}

inline Map map_of(const Tensor& t, const char* name) {
  require(t.dim() == 4, std::string(name) + " must be [N, C, H, W], got " + std::to_string(t.dim()) + " dimensions");
  return {t.data_ptr(), t.size(0), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline bool is_channels_last(const Tensor& t) { return is_channels_last(t.sizes().data(), t.strides().data()); }

// Uninitialised, in the dtype, device and layout of x.
inline Tensor empty_map(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Tensor empty_floats(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, x.device());
}

// What the reductions of an op return for x [N, C, H, W].
inline Tensor empty_sums(const Tensor& x, Reduce reduce) {
  const int64_t n = x.size(0), c = x.size(1);
  if (reduce == Reduce::kNone) return empty_floats(x, {0});
  return empty_floats(x, {reduce == Reduce::kMean ? n : 2, c});
}

// The mean and variance of no values.
inline Tensor undefined_sums(const Tensor& x, Reduce reduce) {
  Tensor sums = empty_sums(x, reduce);
  if (sums.numel() > 0) torch::stable::fill_(sums, std::numeric_limits<double>::quiet_NaN());
  return sums;
}

inline Reduce reduce_of(int64_t code) {
  require(code >= 0 && code <= 2, "reduce must be 0 (none), 1 (mean) or 2 (statistics), got " + std::to_string(code));
  return static_cast<Reduce>(code);
}

// Per-channel vectors of a Transform: mean, var, gamma, beta. They are small: strided ones are copied, and kept here.
class ChannelVectors {
 public:
  ChannelVectors(std::array<std::optional<Tensor>, 4> vectors, double eps, int64_t activation, const Tensor& x)
      : vectors_(std::move(vectors)) {
    static constexpr const char* kNames[] = {"mean", "var", "gamma", "beta"};
    const void* data[4] = {};
    uint32_t float32 = 0;
    require(vectors_[0].has_value() == vectors_[1].has_value(), "mean and var must be given together");
    for (int i = 0; i < 4; ++i) {
      if (!vectors_[i]) continue;
      Tensor& vector = *vectors_[i];
      require(vector.dim() == 1 && vector.size(0) == x.size(1),
              std::string(kNames[i]) + " must be [C] with C = " + std::to_string(x.size(1)));
      const bool wide = vector.scalar_type() == ScalarType::Float;
      require(wide || vector.scalar_type() == x.scalar_type(),
              std::string(kNames[i]) + " must be float32 or have the dtype of x");
      if (!vector.is_contiguous()) vector = torch::stable::contiguous(vector);
      data[i] = vector.data_ptr();
      float32 |= uint32_t{wide} << i;
    }
    transform = make_transform(data[0], data[1], data[2], data[3], static_cast<float>(eps), float32,
                               static_cast<int>(activation));
  }

  Transform transform;

 private:
  std::array<std::optional<Tensor>, 4> vectors_;
};

// Launches on the current stream of the tensor's device; the caller holds a DeviceGuard.
template <class Instance, class Params>
void launch(const Launch<Instance, Params>& plan, void (*kernel)(Params), const Tensor& on) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  kernel<<<plan.grid, plan.block, plan.shared_bytes, static_cast<cudaStream_t>(stream)>>>(plan.params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace effk
