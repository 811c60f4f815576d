// A depthwise convolution's row with channels in the lanes. Only inside csrc/*/cpu_kernel.cpp, as vec.h.
#pragma once

#include "vec_map.h"

namespace effk {
namespace {

constexpr int kMaxKernelSize = 7;

// The tile of output columns that are accumulated in registers: what covers the row with less waste.
inline int tile_of(int64_t out_w) { return ceil_div(out_w, 7) * 7 <= ceil_div(out_w, 8) * 8 ? 7 : 8; }

inline int64_t width_in_tiles(int64_t out_w) { return ceil_div(out_w, tile_of(out_w)) * tile_of(out_w); }

// The same place in the rings of successive vectors must not fall on the same few sets of the cache.
inline int64_t odd_lines(int64_t vectors) { return vectors | 1; }

// Columns of a row with its padding, all that the tiles read.
inline int64_t padded_width(int64_t out_w, int kernel_size, int stride) {
  return (width_in_tiles(out_w) - 1) * stride + kernel_size;
}

// A weight [channels, taps] as [channels / lanes][taps][lanes], with zeros past the last channel.
template <class T>
void pack_taps(const T* weight, int64_t channels, int64_t taps, compute_t<T>* packed) {
  constexpr int V = kLanes<compute_t<T>>;
  for (int64_t c = 0; c < channels; c += V)
    for (int64_t t = 0; t < taps; ++t)
      store(packed + c * taps + t * V,
            load_strided(weight + c * taps + t, taps, static_cast<int>(min64(channels - c, V))));
}

// One output row of kLanes channels, [tiles * Tile][lanes], from the rows [ky_begin, ky_end) of the window that lie
// inside the map.
template <class C>
using ConvRow = void (*)(const C* const* rows, int ky_begin, int ky_end, const C* weights, int64_t tiles, C* out);

template <class C, int K, int S, int Tile>
void conv_row(const C* const* rows, int ky_begin, int ky_end, const C* weights, int64_t tiles, C* out) {
  constexpr int V = kLanes<C>;
  for (int64_t t = 0; t < tiles; ++t) {
    Vec<C> acc[Tile] = {};
    for (int ky = ky_begin; ky < ky_end; ++ky) {
      const C* in = rows[ky] + t * Tile * S * V;
      Vec<C> w[K];
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) w[kx] = load(weights + (ky * K + kx) * V);
#pragma GCC unroll 32
      for (int j = 0; j < (Tile - 1) * S + K; ++j) {
        const Vec<C> v = in_register(load(in + j * V));
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx)
          if (j >= kx && (j - kx) % S == 0 && (j - kx) / S < Tile) acc[(j - kx) / S] += v * w[kx];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Tile; ++i) store(out + (t * Tile + i) * V, acc[i]);
  }
}

template <class C, int K, int S>
ConvRow<C> conv_row_of(int64_t out_w) {
  return tile_of(out_w) == 7 ? &conv_row<C, K, S, 7> : &conv_row<C, K, S, 8>;
}

}  // namespace
}  // namespace effk
