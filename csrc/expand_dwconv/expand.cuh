// The 1x1 expansion of a tile's pixels: its operands come to shared memory, the warps of a block multiply them.
#pragma once

#include "common/async_copy.cuh"
#include "common/matrix.cuh"
#include "dwconv/kernel.cuh"
#include "expand_dwconv/expand.h"

namespace effk {

// Copies `rows` rows of `length` elements to shared memory, `pitch` apart, and zeros up to `depth`. `row(i)` is where
// row i begins, null for zeros; elements are `stride` apart, and with `aligned` come as vectors, by `copy_async`. So
// many `threads` have the block.
template <class T, class Row>
__device__ __forceinline__ void stage_rows(T* shared, int pitch, int rows, int length, int depth, int64_t stride,
                                           bool aligned, int threads, Row row) {
  if (aligned) {
    constexpr int V = kVector<T>;
    const int vectors = depth / V;
    for (int i = threadIdx.x; i < rows * vectors; i += threads) {
      const int at = small_quotient(i, vectors), k = (i - at * vectors) * V;
      T* to = shared + at * pitch + k;
      const T* from = row(at);
      if (from && k < length) {
        copy_async(to, from + k);
      } else {
        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
      }
    }
  } else {
    // Neighbouring threads have neighbouring rows: pixels, which may be neighbours in memory.
    for (int i = threadIdx.x; i < rows * depth; i += threads) {
      const int k = small_quotient(i, rows), at = i - k * rows;
      const T* from = row(at);
      shared[at * pitch + k] = from && k < length ? load_global(from + k * stride) : from_float<T>(0.0f);
    }
  }
}

// The weights of channels c0 to c0 + group - 1, of which those from `channels` on are zero.
template <class T>
__device__ __forceinline__ void stage_weights(T* shared, const Operands& e, int c0, int group, int channels,
                                              int threads) {
  stage_rows(shared, e.pitch, group, e.c, e.depth, 1, e.expand_aligned, threads, [&](int i) {
    return c0 + i < channels ? static_cast<const T*>(e.expand) + int64_t{c0 + i} * e.c : nullptr;
  });
}

// The pixels of image n in a window whose first column and row are x0 and y0, those on the map, one after the other.
template <class T>
__device__ __forceinline__ void stage_pixels(T* shared, const Operands& e, const dwconv::Window& inside, int64_t n,
                                             int x0, int y0, int threads) {
  const T* x = static_cast<const T*>(e.x) + n * e.x_stride.n + int64_t{y0 + inside.top} * e.x_stride.h +
               int64_t{x0 + inside.left} * e.x_stride.w;
  stage_rows(shared, e.pitch, inside.width * inside.height, e.c, e.depth, e.x_stride.c, e.x_aligned, threads,
             [&](int i) {
               const int row = small_quotient(i, inside.width);
               return x + int64_t{row} * e.x_stride.h + int64_t{i - row * inside.width} * e.x_stride.w;
             });
}

template <class T>
using UnitProduct = WarpProduct<T, kUnitPixels / 16, kUnitChannels / 8>;

// Multiplies `pixels` staged pixels by the weights of a group of channels: leave(product, pixel, channel) for each
// unit, of which it names the first. A block has whole warps.
template <class T, class Leave>
__device__ __forceinline__ void multiply_pixels(const T* x, const T* expand, const Operands& e, int pixels, int group,
                                                int threads, bool tf32, Leave leave) {
  const int across = group / kUnitChannels, units = (pixels + kUnitPixels - 1) / kUnitPixels * across;
  for (int unit = threadIdx.x / 32; unit < units; unit += threads / 32) {
    const int down = unit / across, pixel = down * kUnitPixels, channel = (unit - down * across) * kUnitChannels;
    UnitProduct<T> product;
    product.add(x + pixel * e.pitch, e.pitch, expand + channel * e.pitch, e.pitch, e.depth, tf32);
    leave(product, pixel, channel);
  }
}

}  // namespace effk
