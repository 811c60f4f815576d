// A CUDA launch as data: a plan says what is launched, the launcher, the tests and `explain` all read it.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/types.h"

struct CUstream_st;  // *cudaStream_t: a plan is made where there is no CUDA

namespace effk {

using Stream = CUstream_st*;

// Every grid is one-dimensional: its other dimensions end at 65535.
template <class Instance, class Params>
struct Launch {
  Instance instance;  // which kernel; kernel_name(instance) in C++
  unsigned grid, block, shared_bytes;
  Params params;
};

// The memory of a map, as a kernel addresses it: images and channels may lie far apart.
struct Strides {
  int64_t n, c;
  int32_t h, w;
};

constexpr int kVectorBytes = 16;

inline int size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline std::string cuda_name(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? "float" : dtype == Dtype::kFloat16 ? "__half" : "__nv_bfloat16";
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

inline int32_t to_int32(int64_t value, const char* what) {
  if (value > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument(std::string(what) + " must be below 2^31, got " + std::to_string(value));
  return static_cast<int32_t>(value);
}

inline Strides strides_of(const Map& map) {
  return {map.stride_n, map.stride_c, to_int32(map.stride_h, "the stride of a row"),
          to_int32(map.stride_w, "the stride of a column")};
}

// Whether `vector` neighbouring elements, at multiples of `vector`, are one aligned access: along channels, or columns.
inline bool vectorizes(const Map& map, Dtype dtype, bool channels_last, int vector) {
  const int64_t inner = channels_last ? map.c : map.w;
  const int64_t inner_stride = channels_last ? map.stride_c : map.stride_w;
  const int64_t outer_stride = channels_last ? map.stride_w : map.stride_c;
  const auto steps_whole = [&](int64_t size, int64_t stride) { return size <= 1 || stride % vector == 0; };
  return (inner_stride == 1 || inner == 1) && inner % vector == 0 && steps_whole(map.n, map.stride_n) &&
         steps_whole(map.h, map.stride_h) && steps_whole(channels_last ? map.w : map.c, outer_stride) &&
         reinterpret_cast<uintptr_t>(map.data) % (vector * size_of(dtype)) == 0;
}

// The widest such access of at most 16 bytes; 1 where there is none.
inline int widest_vector(const Map& map, Dtype dtype, bool channels_last) {
  int vector = kVectorBytes / size_of(dtype);
  while (vector > 1 && !vectorizes(map, dtype, channels_last, vector)) vector /= 2;
  return vector;
}

}  // namespace effk
