// Between PyTorch's tensors (stable ABI) and launch plans. For cuda.cpp files.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "common/launch.h"
#include "common/tensor.h"
#include "common/transform.h"

namespace effk {

using torch::headeronly::MemoryFormat;
using torch::stable::accelerator::DeviceGuard;

inline Dtype kernel_dtype(const Tensor& tensor, const char* name) {
  const Dtype dtype = dtype_of(tensor, name);
  require(dtype != Dtype::kFloat64, std::string(name) + " must be float32, float16 or bfloat16 on the cuda backend");
  return dtype;
}

// Whether x may be multiplied in TF32: as torch convolves in float32 on CUDA. Only Python knows of that setting: the
// stable ABI does not.
inline bool multiplies_in_tf32(const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float) return false;
  StableIValue stack[1] = {};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("effkernels::allow_tf32", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// Uninitialised, in the dtype and device of x.
inline Tensor empty_map(const Tensor& x, const std::vector<int64_t>& sizes, bool channels_last) {
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// In the layout of x, too.
inline Tensor empty_map(const Tensor& x, const std::vector<int64_t>& sizes) {
  return empty_map(x, sizes, is_channels_last(x));
}

inline Tensor empty_floats(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, x.device());
}

// Those that a launch left unneeded are null.
inline float* floats_of(const Tensor& t) { return t.numel() ? static_cast<float*>(t.data_ptr()) : nullptr; }

// Small tensors may be copied.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) { return t ? std::optional(dense(*t)) : t; }

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

// Vectors [channels] of a Transform of maps of the dtype of x: mean, var, gamma, beta. They are small: strided ones are
// copied, and kept here.
class ChannelVectors {
 public:
  ChannelVectors(std::array<std::optional<Tensor>, 4> vectors, double eps, int64_t activation, int64_t channels,
                 const Tensor& x)
      : vectors_(std::move(vectors)) {
    static constexpr const char* kNames[] = {"mean", "var", "gamma", "beta"};
    const void* data[4] = {};
    uint32_t float32 = 0;
    require(vectors_[0].has_value() == vectors_[1].has_value(), "mean and var must be given together");
    for (int i = 0; i < 4; ++i) {
      if (!vectors_[i]) continue;
      Tensor& vector = *vectors_[i];
      require(vector.dim() == 1 && vector.size(0) == channels,
              std::string(kNames[i]) + " must be [C] with C = " + std::to_string(channels));
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

// Of a BackwardTransform: of maps of the dtype of x, [N, C, H, W].
class BackwardVectors {
 public:
  BackwardVectors(std::array<std::optional<Tensor>, 4> vectors, double eps, int64_t activation,
                  const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                  const std::optional<Tensor>& grad_means, const Tensor& x)
      : forward_(std::move(vectors), eps, activation, x.size(1), x),
        scale_(floats(scale, x.size(0), x.size(1), "scale")),
        shift_(floats(shift, x.size(0), x.size(1), "shift")),
        means_(floats(grad_means, 2, x.size(1), "grad_means")) {
    transform = {forward_.transform, data_of(scale_), data_of(shift_), data_of(means_)};
  }

  BackwardTransform transform;

 private:
  static std::optional<Tensor> floats(const std::optional<Tensor>& t, int64_t rows, int64_t columns, const char* name) {
    require(!t || (t->dim() == 2 && t->size(0) == rows && t->size(1) == columns &&
                   t->scalar_type() == ScalarType::Float),
            std::string(name) + " must be float32, [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
    return dense(t);
  }
  static const float* data_of(const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->data_ptr()) : nullptr;
  }

  ChannelVectors forward_;
  std::optional<Tensor> scale_, shift_, means_;
};

// Of the tensor's device.
inline Stream current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<Stream>(stream);
}

}  // namespace effk
