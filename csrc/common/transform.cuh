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
