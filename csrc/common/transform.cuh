// A Transform for V neighbouring channels, held in registers.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/transform.h"

namespace effk {

template <class T>
__device__ __forceinline__ float load_parameter(const void* from, bool float32, int c) {
  if (float32) return load_global(static_cast<const float*>(from) + c);
  return to_float(load_global(static_cast<const T*>(from) + c));
}

// The identity where there is no normalisation.
template <class T>
__device__ __forceinline__ Normalize load_normalize(const Transform& t, int c) {
  if (!t.mean) return {0.0f, 1.0f, 0.0f};
  const float var = load_parameter<T>(t.var, t.float32 & 2, c);
  const float gamma = t.gamma ? load_parameter<T>(t.gamma, t.float32 & 4, c) : 1.0f;
  const float beta = t.beta ? load_parameter<T>(t.beta, t.float32 & 8, c) : 0.0f;
  return {load_parameter<T>(t.mean, t.float32 & 1, c), gamma / sqrtf(var + t.eps), beta};
}

// One branch for all values.
template <int V>
__device__ __forceinline__ void activate_all(float (&z)[V], const ActivationForm& form) {
  if (form.logistic) {
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = activate(z[v], {true, form.times_z, 0, 0, 0, 0});
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v)
      z[v] = activate(z[v], {false, form.times_z, form.slope, form.offset, form.low, form.high});
  }
}

template <int V>
__device__ __forceinline__ void activate_all_with_slopes(float (&z)[V], float (&slopes)[V], const ActivationForm& form) {
  const auto activate_each = [&](const ActivationForm& known) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Activated a = activate_with_slope(z[v], known);
      z[v] = a.value;
      slopes[v] = a.slope;
    }
  };
  if (form.logistic) {
    activate_each({true, form.times_z, 0, 0, 0, 0});
  } else {
    activate_each({false, form.times_z, form.slope, form.offset, form.low, form.high});
  }
}

template <class T>
__device__ __forceinline__ float load_inverse_deviation(const Transform& t, int c) {
  return 1.0f / sqrtf(load_parameter<T>(t.var, t.float32 & 2, c) + t.eps);
}

// The way back through a Transform, of one channel of one image.
struct alignas(16) ChannelBackward {
  Normalize normalize;
  float slope, constant;  // dx = normalize.scale * dz + slope * (x - mean) + constant
  float scale, shift;
};

template <class T>
__device__ __forceinline__ ChannelBackward load_backward(const BackwardTransform& t, int c, int channels) {
  ChannelBackward b{load_normalize<T>(t.forward, c), 0.0f, 0.0f, 1.0f, 0.0f};
  if (t.means) {
    const float factor = -b.normalize.scale;
    b.slope = factor * load_inverse_deviation<T>(t.forward, c) * load_global(t.means + channels + c);
    b.constant = factor * load_global(t.means + c);
  }
  return b;
}

// Makes it that of image n.
__device__ __forceinline__ void set_image(ChannelBackward& b, const BackwardTransform& t, int64_t n, int c,
                                          int channels) {
  if (t.scale) b.scale = load_global(t.scale + n * channels + c);
  if (t.shift) b.shift = load_global(t.shift + n * channels + c);
}

// Makes dz of `grad`, in place. `of` are the channels of the values, or the one of all.
template <int V, int kChannels>
__device__ __forceinline__ void norm_gradient(float (&grad)[V], const float (&x)[V], const ActivationForm& form,
                                              const ChannelBackward (&of)[kChannels]) {
  static_assert(kChannels == V || kChannels == 1, "channels");
  float z[V], slopes[V];
#pragma unroll
  for (int v = 0; v < V; ++v) z[v] = of[v % kChannels].normalize(x[v]);
  activate_all_with_slopes(z, slopes, form);
#pragma unroll
  for (int v = 0; v < V; ++v) grad[v] = fmaf(grad[v], of[v % kChannels].scale, of[v % kChannels].shift) * slopes[v];
}

// Makes of dz the gradient of x, in place.
template <int V, int kChannels>
__device__ __forceinline__ void input_gradient(float (&dz)[V], const float (&x)[V],
                                               const ChannelBackward (&of)[kChannels]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const ChannelBackward& b = of[v % kChannels];
    dz[v] = fmaf(b.normalize.scale, dz[v], fmaf(x[v] - b.normalize.mean, b.slope, b.constant));
  }
}

template <class T, int V>
struct ChannelTransform {
  const Transform& transform;
  Normalize normalize[V];

  // Channels from c on, of which the first `valid` exist.
  __device__ __forceinline__ ChannelTransform(const Transform& t, int c, int valid) : transform(t) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      normalize[v] = {0.0f, 1.0f, 0.0f};
      if (v < valid) normalize[v] = load_normalize<T>(t, c + v);
    }
  }

  __device__ __forceinline__ void operator()(float (&z)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = normalize[v](z[v]);
    activate_all(z, transform.activation);
  }
};

}  // namespace effk
