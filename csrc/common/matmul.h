// Matrix products of the CPU kernels: rows of a map (pixels) times a 1x1 convolution's weight, in tiles that stay in
// registers. Only inside csrc/*/cpu_kernel.cpp, as vec.h.
//
//     pack_weight(weight, columns, depth, packed);  // once: [columns, depth] -> packed_size<C>(columns, depth)
//     const Panels<C> panels(columns);
//     for (int64_t i = 0; i < panels.count; ++i)
//       multiply<C>(rows, row_count, packed + panels.offset(i, depth), panels.vectors(i), out, out_row, out_vector);
//
// `out` is the raw product. What follows (scale, shift, activation, residual, statistics, conversion) is a pass over rows
// that are still in the first-level cache: against `depth` multiplications per value its load and store are nothing, and
// the tiles stay free of it.
#pragma once

#include <utility>

#include "vec_map.h"

namespace effk {
namespace {

// A tile is kTileRows rows x kPanelVectors vectors of columns: the accumulators, a row of the weight and one broadcast
// value fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kPanelVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kPanelVectors = 3;
#else
constexpr int kTileRows = 4, kPanelVectors = 2;
#endif

// The columns of a weight in panels of up to kPanelVectors vectors, as even as can be.
template <class C>
struct Panels {
  int64_t all, count;  // vectors of the weight, panels

  explicit Panels(int64_t columns) : all(ceil_div(columns, kLanes<C>)), count(ceil_div(all, kPanelVectors)) {}

  int64_t begin(int64_t i) const { return i * all / count; }  // the panel's first vector
  int vectors(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
  int64_t offset(int64_t i, int64_t depth) const { return begin(i) * kLanes<C> * depth; }  // of the panel, packed
};

template <class C>
int64_t packed_size(int64_t columns, int64_t depth) {
  return round_up<C>(columns) * depth;
}

// Rearranges `count` elements along the depth of a weight [columns, depth], which begin at `first`, to panels of
// [depth][vectors][lanes], with zeros past the last column. Strides are those of `weight`.
template <class T>
void pack_weight(const T* weight, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth, int64_t first,
                 int64_t count, compute_t<T>* packed) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const Panels<C> panels(columns);
  for (int64_t i = 0; i < panels.count; ++i) {
    const int vectors = panels.vectors(i);
    for (int v = 0; v < vectors; ++v) {
      const int64_t column = (panels.begin(i) + v) * V, columns_here = min64(columns - column, V);
      for (int64_t k = 0; k < count; k += V) {
        const int here = static_cast<int>(min64(count - k, V));
        Vec<C> block[V] = {};
        for (int64_t j = 0; j < columns_here; ++j) {
          const T* at = weight + (column + j) * column_stride + k * k_stride;
          block[j] = k_stride == 1 ? load_n(at, here) : load_strided(at, k_stride, here);
        }
        transpose<C>(block);
        C* out = packed + panels.offset(i, depth) + ((first + k) * vectors + v) * V;
        for (int j = 0; j < here; ++j) store(out + j * vectors * V, block[j]);
      }
    }
  }
}

// The whole of a dense weight.
template <class T>
void pack_weight(const T* weight, int64_t columns, int64_t depth, compute_t<T>* packed) {
  pack_weight(weight, depth, 1, columns, depth, 0, depth, packed);
}

// The left operand. Element k of row r is at data[r * stride + k / segment * segment_stride + k % segment * k_stride]:
// the pixels of any map, and of one that is kept in blocks of channels.
template <class C>
struct Rows {
  const C* data;
  int64_t stride, k_stride;
  int64_t depth;
  int64_t segment, segment_stride;

  // Rows that are whole.
  Rows(const C* data, int64_t stride, int64_t k_stride, int64_t depth)
      : Rows(data, stride, k_stride, depth, depth, 0) {}
  Rows(const C* data, int64_t stride, int64_t k_stride, int64_t depth, int64_t segment, int64_t segment_stride)
      : data(data), stride(stride), k_stride(k_stride), depth(depth), segment(segment), segment_stride(segment_stride) {}
};

// Fetches a line of `ahead` per step of the depth.
template <class C, int R, int V, bool kAdd>
void multiply_tile(const Rows<C>& a, const C* w, C* out, int64_t out_row, int64_t out_vector, const C* ahead) {
  // Of every third row, so that with strides known only at run time no address spills.
  constexpr int kBases = (R + 2) / 3;
  const int64_t stride = a.stride, step = a.k_stride;
  Vec<C> acc[R][V] = {};
  if (kAdd)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) __builtin_prefetch(out + r * out_row + v * out_vector, 1);
  const C* segment = a.data;
  for (int64_t begin = 0; begin < a.depth; begin += a.segment, segment += a.segment_stride) {
    const C* base[kBases];
    for (int i = 0; i < kBases; ++i) base[i] = segment + 3 * i * stride;
    for (int64_t k = min64(a.segment, a.depth - begin); k > 0; --k) {
      Vec<C> b[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) b[v] = load(w + v * kLanes<C>);
      w += V * kLanes<C>;
      __builtin_prefetch(ahead, 0, 2);
      ahead += kLanes<C>;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<C> value = in_register(broadcast(base[r / 3][r % 3 * stride]));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += value * b[v];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kBases; ++i) base[i] += step;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      C* at = out + r * out_row + v * out_vector;
      store(at, kAdd ? load(at) + acc[r][v] : acc[r][v]);
    }
}

template <class C>
using MultiplyTile = void (*)(const Rows<C>&, const C*, C*, int64_t, int64_t, const C*);

template <class C, bool kAdd, int V, int... R>
inline MultiplyTile<C> multiply_tile_of(int rows, std::integer_sequence<int, R...>) {
  static constexpr MultiplyTile<C> tiles[] = {&multiply_tile<C, R + 1, V, kAdd>...};
  return tiles[rows - 1];
}

template <class C, bool kAdd>
inline MultiplyTile<C> multiply_tile_for(int rows, int vectors) {
  constexpr auto sizes = std::make_integer_sequence<int, kTileRows>{};
  static_assert(kPanelVectors <= 3);
  return vectors == 1   ? multiply_tile_of<C, kAdd, 1>(rows, sizes)
         : vectors == 2 ? multiply_tile_of<C, kAdd, 2>(rows, sizes)
                        : multiply_tile_of<C, kAdd, kPanelVectors>(rows, sizes);
}

// What will be read next, to be fetched during a product.
template <class C>
struct Ahead {
  const C* data;
  int64_t size;
};

// out[r][v] = the product of row r and vector v of a packed panel, or += that; strides in elements. `count` rows.
// Meanwhile `next` is fetched, the panel after this one if nothing else is given.
template <class C, bool kAdd = false>
void multiply(Rows<C> a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row, int64_t out_vector,
              Ahead<C> next = {}) {
  // Tiles as even as can be: nine rows as 5 and 4, since one row alone would wait for each of its products.
  const int64_t tiles = ceil_div(count, kTileRows);
  const C* data = a.data;
  const int64_t size = a.depth * vectors * kLanes<C>, step = a.depth * kLanes<C>;
  if (!next.data) next = {panel + size, size};
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = i * count / tiles, rows = (i + 1) * count / tiles - row;
    a.data = data + row * a.stride;
    multiply_tile_for<C, kAdd>(static_cast<int>(rows), vectors)(
        a, panel, out + row * out_row, out_row, out_vector, i * step < next.size ? next.data + i * step : panel);
  }
}

}  // namespace
}  // namespace effk
