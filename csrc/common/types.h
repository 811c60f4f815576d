// Torch-free vocabulary of the kernels: storage types, reductions, feature maps.
#pragma once

#include <cstdint>

namespace effk {

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

enum class Reduce : int32_t { kNone, kMean, kStatistics };

// Storage formats that the kernels only convert, never compute in.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What a kernel computes and accumulates in for a storage type.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

// A feature map [N, C, H, W] of any strides, in elements.
struct Map {
  const void* data;
  int64_t n, c, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// A 1x1 convolution of x whose output, of `channels` channels, a kernel works on though it is not in memory.
struct Expansion {
  Map x;               // null: there is none, the output is a map
  const void* weight;  // [channels, x.c], dense, of the dtype of x
};

// scale * z + shift per channel, of compute_t, where not null; then an activation.
struct Affine {
  const void* scale;
  const void* shift;
  int32_t activation;
};

// A BatchNorm and an activation in the backward pass, vectors [C] of compute_t: z = scale * x + shift, and the gradient
// of x from dz is scale * dz + slope * (x - mean) + constant. No scale: z is x; no slope: the statistics are fixed.
struct NormBackward {
  const void *scale, *shift, *mean, *slope, *constant;
  int32_t activation;
};

}  // namespace effk
