// Matrix products of the CPU kernels: rows of a map (pixels) times a 1x1 convolution's weight, in tiles that stay in
// registers. Only inside csrc/*/cpu_kernel.cpp, as vec.h.
//
//     using P = Product<T>;  // T is stored, C = compute_t<T> is computed
//     pack_weight<P>(weight, columns, depth, packed);  // once: [columns, depth] -> packed_size<P>(columns, depth)
//     const P product(row_count);
//     const Rows<C> left = P::left({x, x_row, 1, depth}, row_count, nullptr, buffer);  // left_size(row_count, depth)
//     const Panels<C> panels(columns);
//     for (int64_t i = 0; i < panels.count; ++i)
//       product.store(left, row_count, packed + panels.begin(i) * P::column_vector(depth), panels.vectors(i), out, out_row,
//                     out_vector);
//
// `out` is the raw product. What follows (scale, shift, activation, residual, statistics, conversion) is a pass over rows
// that are still in the first-level cache: against `depth` multiplications per value its load and store are nothing, and
// the tiles stay free of it.
#pragma once

#include <type_traits>
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

// Where the rows of a map are shorter, so many pixels of several rows are multiplied at once: fills tiles, and reuses the
// weights.
constexpr int64_t kGroupPixels = 48;

constexpr int64_t kAllPanels = INT64_MAX;

// The columns of a weight in panels of up to kPanelVectors vectors, as even as can be.
template <class C>
struct Panels {
  int64_t all, count;  // vectors of the weight, panels

  explicit Panels(int64_t columns) : all(ceil_div(columns, kLanes<C>)), count(ceil_div(all, kPanelVectors)) {}

  int64_t begin(int64_t i) const { return i * all / count; }  // the panel's first vector
  int vectors(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
};

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

  const C* at(int64_t row, int64_t k) const {
    return data + row * stride + k / segment * segment_stride + k % segment * k_stride;
  }
};

// What will be read next, to be fetched during a product.
template <class C>
struct Ahead {
  const C* data;
  int64_t size;
};

// A step of the depth: what is broadcast of a row, and its products with a vector of columns.
template <class Element>
struct MultiplyAdd {
  using C = Element;
  static EFFK_INLINE Vec<C> left(const C* at) { return broadcast(*at); }
  static EFFK_INLINE Vec<C> add(Vec<C> sum, Vec<C> a, Vec<C> b) { return sum + a * b; }
};

// Fetches a line of `ahead` per step of the depth.
template <class Step, int R, int V, bool kAdd, class C = typename Step::C>
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
        const Vec<C> value = in_register(Step::left(base[r / 3] + r % 3 * stride));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = Step::add(acc[r][v], value, b[v]);
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

template <class Step, bool kAdd, int V, int... R>
inline MultiplyTile<typename Step::C> multiply_tile_of(int rows, std::integer_sequence<int, R...>) {
  static constexpr MultiplyTile<typename Step::C> tiles[] = {&multiply_tile<Step, R + 1, V, kAdd>...};
  return tiles[rows - 1];
}

template <class Step, bool kAdd>
inline MultiplyTile<typename Step::C> multiply_tile_for(int rows, int vectors) {
  constexpr auto sizes = std::make_integer_sequence<int, kTileRows>{};
  static_assert(kPanelVectors <= 3);
  return vectors == 1   ? multiply_tile_of<Step, kAdd, 1>(rows, sizes)
         : vectors == 2 ? multiply_tile_of<Step, kAdd, 2>(rows, sizes)
                        : multiply_tile_of<Step, kAdd, kPanelVectors>(rows, sizes);
}

// Products in tiles of registers.
template <class Step>
class TiledProduct {
 public:
  using C = typename Step::C;

  // For products of about `count` rows.
  explicit TiledProduct(int64_t) {}

  // out[r][v] = the product of row r and vector v of a packed panel; strides in elements. `count` rows. Meanwhile `next`
  // is fetched, the panel after this one if nothing else is given.
  void store(const Rows<C>& a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row, int64_t out_vector,
             Ahead<C> next = {}) const {
    run<false>(a, count, panel, vectors, out, out_row, out_vector, next);
  }
  // out[r][v] += that.
  void add(const Rows<C>& a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row,
           int64_t out_vector) const {
    run<true>(a, count, panel, vectors, out, out_row, out_vector, {});
  }

 private:
  template <bool kAdd>
  static void run(Rows<C> a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row, int64_t out_vector,
                  Ahead<C> next) {
    // Tiles as even as can be: nine rows as 5 and 4, since one row alone would wait for each of its products.
    const int64_t tiles = ceil_div(count, kTileRows);
    const C* data = a.data;
    const int64_t size = a.depth * vectors * kLanes<C>, step = a.depth * kLanes<C>;
    if (!next.data) next = {panel + size, size};
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = i * count / tiles, rows = (i + 1) * count / tiles - row;
      a.data = data + row * a.stride;
      multiply_tile_for<Step, kAdd>(static_cast<int>(rows), vectors)(
          a, panel, out + row * out_row, out_row, out_vector, i * step < next.size ? next.data + i * step : panel);
    }
  }
};

// Operands as they are: rows where they lie, a panel of a weight as [depth][vectors][lanes].
template <class T>
class PlainProduct : public TiledProduct<MultiplyAdd<compute_t<T>>> {
 public:
  using C = compute_t<T>;
  using TiledProduct<MultiplyAdd<C>>::TiledProduct;
  static constexpr bool kOwnOperands = false;
  static constexpr int64_t kSlack = 0;

  // Sizes in elements of C: the depth that products run over, a row of a left operand that was made, a vector of columns
  // of a right one.
  static int64_t padded(int64_t depth) { return depth; }
  static int64_t row(int64_t depth) { return depth; }
  static int64_t column_vector(int64_t depth) { return depth * kLanes<C>; }
  // Of the buffer for `left`.
  static int64_t left_size(int64_t count, int64_t depth, bool gated = false) { return gated ? count * depth : 0; }
  static int64_t right_size(int64_t) { return 0; }

  // `count` rows as the left operand, times gate [depth] if there is one.
  static Rows<C> left(const Rows<C>& rows, int64_t count, const C* gate, C* buffer) {
    if (!gate) return rows;
    for (int64_t k = 0; k < rows.depth; k += kLanes<C>) {
      const int lanes = static_cast<int>(min64(rows.depth - k, kLanes<C>));
      const Vec<C> g = load_n(gate + k, lanes);
      const C* from = rows.at(0, k);
      for (int64_t r = 0; r < count; ++r) store_n(buffer + r * rows.depth + k, load_n(from + r * rows.stride, lanes) * g, lanes);
    }
    return {buffer, rows.depth, 1, rows.depth};
  }

  // Whether the pixels of a map are rows of a left operand as they lie, and those from `x` on.
  static bool takes(const Map&) { return std::is_same_v<T, C>; }
  static Rows<C> in_place(const T* x, int64_t stride, int64_t k_stride, int64_t depth) {
    return {reinterpret_cast<const C*>(x), stride, k_stride, depth};
  }

  // A panel [depth][vectors][lanes] as the right operand.
  static const C* right(const C* panel, int64_t, int, C*) { return panel; }
};

}  // namespace
}  // namespace effk

#if defined(__AVX512BF16__)
#include "matmul_bf16.h"
#endif

namespace effk {
namespace {

#if defined(__AVX512BF16__)
template <class T>
using Product = std::conditional_t<std::is_same_v<T, BFloat16>, Bfloat16Product, PlainProduct<T>>;

// f(T{}) for the storage type of a product, which is bfloat16: for others this instruction set has nothing to add.
template <class F>
void with_product_storage(Dtype, F f) {
  f(BFloat16{});
}
#else
template <class T>
using Product = PlainProduct<T>;

template <class F>
void with_product_storage(Dtype dtype, F f) {
  with_storage(dtype, f);
}
#endif

template <class P>
int64_t packed_size(int64_t columns, int64_t depth) {
  return ceil_div(columns, kLanes<typename P::C>) * P::column_vector(depth);
}

// Of the panels of a weight with `columns` columns, those from `begin` to `end`. Packs `count` elements along the depth,
// which begin at `first`, a multiple of P::padded(1). fill(k, n, column, lanes, out, stride) gives elements [k, k + n) of
// them of a vector of columns.
template <class P, class Fill>
void pack_panels(int64_t columns, int64_t depth, int64_t first, int64_t count, typename P::C* packed, Fill fill,
                 int64_t begin = 0, int64_t end = kAllPanels) {
  using C = typename P::C;
  constexpr int V = kLanes<C>;
  C buffer[2 * V * kPanelVectors * V];
  const Panels<C> panels(columns);
  for (int64_t i = max64(begin, 0); i < min64(end, panels.count); ++i) {
    const int vectors = panels.vectors(i);
    C* panel = packed + panels.begin(i) * P::column_vector(depth) + vectors * P::column_vector(first);
    for (int64_t k = 0; k < count; k += 2 * V) {
      const int64_t n = min64(count - k, 2 * V);
      C* out = panel + vectors * P::column_vector(k);
      C* block = P::kOwnOperands ? buffer : out;
      for (int v = 0; v < vectors; ++v) {
        const int64_t column = (panels.begin(i) + v) * V;
        fill(k, n, column, static_cast<int>(min64(columns - column, V)), block + v * V, vectors * V);
      }
      P::right(block, n, vectors, out);
    }
  }
}

// out[i * stride] = elements i of `columns` rows, i < n, for a vector of rows side by side. Rows of a weight are short, and
// too many for the processor to follow: those `ahead` rows on are fetched meanwhile.
template <class T>
void transpose_rows(const T* weight, int64_t column_stride, int64_t k_stride, int columns, int64_t n, int64_t ahead,
                    compute_t<T>* out, int64_t stride) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  for (int64_t k = 0; k < n; k += V, out += V * stride) {
    const int here = static_cast<int>(min64(n - k, V));
    const T* at = weight + k * k_stride;
    for (int j = 0; j < columns; ++j) __builtin_prefetch(at + (j + ahead) * column_stride, 0, 2);
    Vec<C> block[V] = {};
    if (k_stride == 1 && here == V && columns == V) {
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) block[j] = load(at + j * column_stride);
      transpose<C>(block);
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) store(out + j * stride, block[j]);
    } else {
      for (int j = 0; j < columns; ++j, at += column_stride)
        block[j] = k_stride == 1 ? load_n(at, here) : load_strided(at, k_stride, here);
      transpose<C>(block);
      for (int j = 0; j < here; ++j) store(out + j * stride, block[j]);
    }
  }
}

// A weight [columns, depth] with strides, or a part of its depth, or some of its panels.
template <class P, class T>
void pack_weight(const T* weight, int64_t column_stride, int64_t k_stride, int64_t columns, int64_t depth, int64_t first,
                 int64_t count, compute_t<T>* packed, int64_t begin = 0, int64_t end = kAllPanels) {
  pack_panels<P>(columns, depth, first, count, packed,
                 [&](int64_t k, int64_t n, int64_t column, int columns_here, compute_t<T>* out, int64_t stride) {
    transpose_rows(weight + column * column_stride + k * k_stride, column_stride, k_stride, columns_here, n,
                   kPanelVectors * kLanes<compute_t<T>>, out, stride);
  }, begin, end);
}

// A dense weight, or some of its panels.
template <class P, class T>
void pack_weight(const T* weight, int64_t columns, int64_t depth, compute_t<T>* packed, int64_t begin = 0,
                 int64_t end = kAllPanels) {
  pack_weight<P>(weight, depth, 1, columns, depth, 0, depth, packed, begin, end);
}

}  // namespace
}  // namespace effk
