// The layout of an output: PyTorch's `suggest_memory_format` on sizes and strides.
#pragma once

#include <cstdint>

namespace effk {

// Whether a map [N, C, H, W] with these strides counts as channels_last. As in PyTorch, NCHW wins where both fit.
static inline bool is_channels_last(const int64_t* sizes, const int64_t* strides) {
  if (strides[1] == 0) return false;
  int64_t at_least = 0;
  for (int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < at_least) return false;
    // [N, C, 1, 1] laid out as NCHW has these strides too.
    if (d == 0 && at_least == strides[1]) return false;
    at_least = strides[d] * sizes[d];
  }
  return true;
}

// Strides of a dense map [N, C, H, W].
static inline void dense_strides(const int64_t* sizes, bool channels_last, int64_t* strides) {
  const int64_t c = sizes[1], h = sizes[2], w = sizes[3];
  strides[0] = c * h * w;
  strides[1] = channels_last ? 1 : h * w;
  strides[2] = channels_last ? w * c : w;
  strides[3] = channels_last ? c : 1;
}

}  // namespace effk
