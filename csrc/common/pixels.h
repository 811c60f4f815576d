// Blocks of pixels with channels in the lanes, between maps in memory and the kernels that work on them. Only inside
// csrc/*/cpu_kernel.cpp, as vec.h.
#pragma once

#include "vec_map.h"

namespace effk {
namespace {

// `count` pixels of up to one vector of channels to [pixels][lanes].
template <class T>
void load_pixels(const T* x, int64_t stride_w, int64_t stride_c, int64_t count, int lanes, compute_t<T>* out) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  if (stride_w != 1 || stride_c == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const T* at = x + i * stride_w;
      __builtin_prefetch(at + count * stride_w, 0, 2);  // the next row's
      store(out + i * V, stride_c == 1 ? load_n(at, lanes) : load_strided(at, stride_c, lanes));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += V) {
    const int pixels = static_cast<int>(min64(count - i, V));
    Vec<C> block[V] = {};
    for (int c = 0; c < lanes; ++c) block[c] = load_n(x + c * stride_c + i, pixels);
    transpose<C>(block);
    for (int j = 0; j < pixels; ++j) store(out + (i + j) * V, block[j]);
  }
}

// out = act(scale(in)) for n vectors, and their sum; as precise as the storage type T needs.
template <class C>
using Finish = Vec<C> (*)(const C* in, C* out, int64_t n, const Scale<C>& scale);

template <class T, int A>
Vec<compute_t<T>> finish(const compute_t<T>* in, compute_t<T>* out, int64_t n, const Scale<compute_t<T>>& scale) {
  using C = compute_t<T>;
  Vec<C> sum{};
  for (int64_t i = 0; i < n; ++i) {
    const Vec<C> z = activate_for<T, A>(scale(load(in + i * kLanes<C>)));
    store(out + i * kLanes<C>, z);
    sum += z;
  }
  return sum;
}

template <class T>
Finish<compute_t<T>> finish_for(int activation) {
  Finish<compute_t<T>> chosen = nullptr;
  with_activation(activation, [&](auto act) { chosen = &finish<T, act>; });
  return chosen;
}

// Scales and shifts of channels packed to whole vectors: all scales, then all shifts.
template <class C>
void pack_norm(const Affine& norm, int64_t channels, C* packed) {
  for (int64_t c = 0; c < channels; c += kLanes<C>) {
    const auto scale = Scale<C>::lanes(norm, c, static_cast<int>(min64(channels - c, kLanes<C>)));
    store(packed + c, scale.scale);
    store(packed + round_up<C>(channels) + c, scale.shift);
  }
}

template <class C>
Scale<C> packed_scale(const C* norm, int64_t channels, int64_t vector) {
  const C* scale = norm + vector * kLanes<C>;
  return {load(scale), load(scale + round_up<C>(channels))};
}

// A map [N, channels, h, w] to be written, dense, and one of the same sizes to be added to it.
struct Output {
  void* y;
  int64_t channels, h, w;
  bool channels_last;
  const Map* shortcut;  // or null
};

// Writes pixels [pixel, pixel + count) of one vector of channels of image n from [pixels][lanes].
template <class T>
void store_pixels(const Output& o, int64_t n, int64_t pixel, int64_t count, int64_t vector, const compute_t<T>* in) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int64_t c = vector * V, map = o.h * o.w;
  const int lanes = static_cast<int>(min64(o.channels - c, V));
  const Map* x = o.shortcut;
  T* y = static_cast<T*>(o.y) + n * o.channels * map;
  if (o.channels_last) {
    int64_t row = pixel / o.w, column = pixel % o.w;
    for (int64_t i = 0; i < count; ++i) {
      Vec<C> z = load(in + i * V);
      if (x) {
        const T* at = row_of<T>(*x, n, c, row) + column * x->stride_w;
        z += x->stride_c == 1 ? load_n(at, lanes) : load_strided(at, x->stride_c, lanes);
        if (++column == o.w) column = 0, ++row;
      }
      store_n(y + (pixel + i) * o.channels + c, z, lanes);
    }
    return;
  }
  const bool dense = x && x->stride_w == 1 && (x->stride_h == x->w || x->h == 1);
  for (int64_t i = 0; i < count; i += V) {
    const int here = static_cast<int>(min64(count - i, V));
    Vec<C> block[V] = {};
    for (int j = 0; j < here; ++j) block[j] = load(in + (i + j) * V);
    transpose<C>(block);
    for (int j = 0; j < lanes; ++j) {
      Vec<C> z = block[j];
      if (dense) {
        z += load_n(row_of<T>(*x, n, c + j, 0) + pixel + i, here);
      } else if (x) {
        C added[V] = {};
        for (int l = 0; l < here; ++l) {
          const int64_t at = pixel + i + l;
          added[l] = load_n(row_of<T>(*x, n, c + j, at / o.w) + at % o.w * x->stride_w, 1)[0];
        }
        z += load(added);
      }
      store_n(y + (c + j) * map + pixel + i, z, here);
    }
  }
}

// Into how many pieces `extent` is cut so that `threads` threads finish `items` times as many soonest; each piece costs
// `extra` more.
inline int64_t best_split(int64_t items, int64_t extent, int64_t extra, int64_t least, int64_t threads) {
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t pieces = 1; pieces <= max64(extent / least, 1) && pieces <= 4 * threads; ++pieces) {
    const int64_t size = ceil_div(extent, pieces);
    const int64_t cost = ceil_div(items * ceil_div(extent, size), threads) * (size + extra);
    if (cost < best_cost) best = pieces, best_cost = cost;
  }
  return best;
}

}  // namespace
}  // namespace effk
