// Pixels of one image by channels, as the CPU kernels compute on them: a row of channels per pixel, whatever the map's
// layout and dtype. Only inside csrc/*/cpu_kernel.cpp, as vec.h.
#pragma once

#include "vec_map.h"

namespace effk {
namespace {

template <class C>
struct Tile {
  const C* data;
  int64_t stride;  // from one pixel to the next
  int64_t ahead;   // to what is wanted next, 0 in a buffer

  // A vector of channels from c on; what lies ahead of it is fetched meanwhile.
  EFFK_INLINE Vec<C> at(int64_t pixel, int64_t c) const {
    const C* from = data + pixel * stride + c;
    __builtin_prefetch(from + ahead, 0, 2);
    return load(from);
  }
};

// f(pixel in the tile, offset of its first channel, pixels) for runs of evenly spaced pixels of `count` from `first` on.
template <class F>
inline void for_runs(const Map& m, int64_t n, int64_t first, int64_t count, F f) {
  const bool dense = m.h == 1 || m.stride_h == m.w * m.stride_w;
  for (int64_t done = 0; done < count;) {
    const int64_t row = (first + done) / m.w, column = (first + done) % m.w;
    const int64_t length = dense ? count - done : min64(count - done, m.w - column);
    f(done, n * m.stride_n + row * m.stride_h + column * m.stride_w, length);
    done += length;
  }
}

// `channels` channels from c on of `count` pixels from `first` on. They are copied to `buffer`, [count][stride], zero in
// the lanes past the last channel, unless they can be read where they are: then a stride of 0 lets the tile choose.
template <class T>
Tile<compute_t<T>> load_tile(const Map& m, int64_t n, int64_t first, int64_t count, int64_t c, int64_t channels,
                             compute_t<T>* buffer, int64_t stride = 0) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const T* data = static_cast<const T*>(m.data) + c * m.stride_c;
  if constexpr (std::is_same_v<T, C>) {
    const bool even = m.h == 1 || m.stride_h == m.w * m.stride_w || first % m.w + count <= m.w;
    if (stride == 0 && even && m.stride_c == 1 && channels % V == 0)
      return {data + n * m.stride_n + first / m.w * m.stride_h + first % m.w * m.stride_w, m.stride_w, count * m.stride_w};
  }
  if (stride == 0) stride = round_up<C>(channels);
  for_runs(m, n, first, count, [&](int64_t pixel, int64_t offset, int64_t length) {
    const T* in = data + offset;
    C* out = buffer + pixel * stride;
    for (int64_t v = 0; v < channels; v += V) {
      const int lanes = static_cast<int>(min64(channels - v, V));
      if (m.stride_w == 1 && m.stride_c != 1) {  // NCHW
        Vec<C> block[V] = {};
        for (int64_t i = 0; i < length; i += V) {
          const int pixels = static_cast<int>(min64(length - i, V));
          for (int j = 0; j < lanes; ++j) block[j] = load_n(in + (v + j) * m.stride_c + i, pixels);
          for (int j = lanes; j < V; ++j) block[j] = Vec<C>{};
          transpose<C>(block);
          for (int j = 0; j < pixels; ++j) store(out + (i + j) * stride + v, block[j]);
        }
      } else if (m.stride_c == 1) {
        for (int64_t i = 0; i < length; ++i) store(out + i * stride + v, load_n(in + i * m.stride_w + v, lanes));
      } else {
        for (int64_t i = 0; i < length; ++i)
          store(out + i * stride + v, load_strided(in + i * m.stride_w + v * m.stride_c, m.stride_c, lanes));
      }
    }
  });
  return {buffer, stride, 0};
}

// Stores a tile in a dense map. In channels_last what lies `ahead` of it, in elements, is fetched to be written next.
template <class T>
void store_tile(const Map& m, int64_t n, int64_t first, int64_t count, int64_t c, int64_t channels,
                const compute_t<T>* tile, int64_t stride, int64_t ahead = 0) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  T* out = static_cast<T*>(const_cast<void*>(m.data)) + n * m.stride_n + c * m.stride_c + first * m.stride_w;
  if (m.stride_c == 1) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < channels; v += V) {
        T* at = out + i * m.stride_w + v;
        __builtin_prefetch(at + ahead, 1);
        store_n(at, load(tile + i * stride + v), static_cast<int>(min64(channels - v, V)));
      }
    return;
  }
  for (int64_t v = 0; v < channels; v += V) {
    const int lanes = static_cast<int>(min64(channels - v, V));
    Vec<C> block[V] = {};
    for (int64_t i = 0; i < count; i += V) {
      const int pixels = static_cast<int>(min64(count - i, V));
      for (int j = 0; j < pixels; ++j) block[j] = load(tile + (i + j) * stride + v);
      transpose<C>(block);
      for (int j = 0; j < lanes; ++j) store_n(out + (v + j) * m.stride_c + i, block[j], pixels);
    }
  }
}

// Pixels whose vectors are worked on one after the other: the vectors of a channel lie apart in memory, and a map that is
// walked through in another order than that of memory is read at a fraction of the speed.
constexpr int64_t kPixelBlock = 8;

// f(first channel, channels, first pixel, end) for blocks of pixels and vectors of channels, in about the order of memory.
template <class C, class F>
inline EFFK_INLINE void for_blocks(int64_t pixels, int64_t channels, F f) {
  for (int64_t i = 0; i < pixels; i += kPixelBlock)
    for (int64_t c = 0; c < channels; c += kLanes<C>)
      f(c, static_cast<int>(min64(channels - c, kLanes<C>)), i, min64(i + kPixelBlock, pixels));
}

// kLanes values of a [C] vector that may be missing.
template <class C>
inline EFFK_INLINE Vec<C> lanes_of(const void* vector, int64_t c, int n, C otherwise) {
  return vector ? load_n(static_cast<const C*>(vector) + c, n) : broadcast(otherwise);
}

}  // namespace
}  // namespace effk
