// Storage types on the device: aligned vectors and conversion to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace effk {

template <int kBytes>
struct Raw;
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

// V neighbouring elements, loaded and stored in one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Vec {
  using raw_t = typename Raw<sizeof(T) * V>::type;
  T at[V];

  static __device__ __forceinline__ Vec load(const T* from) {
    Vec vec;
    *reinterpret_cast<raw_t*>(vec.at) = *reinterpret_cast<const raw_t*>(from);
    return vec;
  }
  // Through the read-only cache: what no thread writes during the kernel.
  static __device__ __forceinline__ Vec load_global(const T* from) {
    Vec vec;
    *reinterpret_cast<raw_t*>(vec.at) = __ldg(reinterpret_cast<const raw_t*>(from));
    return vec;
  }
  __device__ __forceinline__ void store(T* to) const {
    *reinterpret_cast<raw_t*>(to) = *reinterpret_cast<const raw_t*>(at);
  }
  // An intrinsic, which the compiler cannot take apart to share code with a path of scalar stores.
  __device__ __forceinline__ void store_global(T* to) const {
    __stwb(reinterpret_cast<raw_t*>(to), *reinterpret_cast<const raw_t*>(at));
  }
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <class T, int V>
__device__ __forceinline__ void to_floats(float (&values)[V], const Vec<T, V>& vec) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = to_float(vec.at[v]);
}

template <class T>
__device__ __forceinline__ T load_global(const T* from) {
  return Vec<T, 1>::load_global(from).at[0];
}

// V elements of which the first `valid` exist (at most V; none if negative), the others zero. `stride` is between
// elements; `vector` promises an aligned, complete vector.
template <int V, class T>
__device__ __forceinline__ Vec<T, V> load_some(const T* from, int64_t stride, int valid, bool vector) {
  Vec<T, V> vec;
#pragma unroll
  for (int v = 0; v < V; ++v) vec.at[v] = from_float<T>(0.0f);
  if (vector) {
    if (valid > 0) vec = Vec<T, V>::load_global(from);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (v < valid) vec.at[v] = load_global(from + v * stride);
  }
  return vec;
}

template <int V, class T>
__device__ __forceinline__ void store_some(T* to, const Vec<T, V>& vec, int64_t stride, int valid, bool vector) {
  if (vector) {
    if (valid > 0) vec.store_global(to);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (v < valid) to[v * stride] = vec.at[v];
  }
}

// Calls f with a vector width, 1 to 8, as a compile-time constant.
template <class F>
__device__ __forceinline__ void with_width(int width, F f) {
  switch (width) {
    case 8:
      return f(std::integral_constant<int, 8>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 2:
      return f(std::integral_constant<int, 2>());
    default:
      return f(std::integral_constant<int, 1>());
  }
}

// n / d for 0 <= n < 2^20 and d > 0, in a few instructions.
__device__ __forceinline__ int small_quotient(int n, int d) {
  return static_cast<int>((n + 0.5f) * __frcp_rn(static_cast<float>(d)));
}

// The dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}

// The block sets `bytes` of shared memory, a multiple of 16, to zero.
__device__ __forceinline__ void clear_shared(void* memory, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) static_cast<uint4*>(memory)[i] = uint4{0, 0, 0, 0};
}

}  // namespace effk
