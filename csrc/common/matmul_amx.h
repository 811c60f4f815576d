// Products on the matrix unit of x86 processors (AMX), which multiplies bfloat16 and adds up in float. Only inside
// matmul.h.
//
// A float is the sum of three bfloat16, exactly: of the first, second and last eight bits of its significand. Of the nine
// products of two such sums, those of the six with the largest factors are taken, which leaves a relative error of 2^-22
// of each product, on average a quarter of it; since a tile adds up 32 values at a time, that is less than the rounding
// error of a sum of floats one by one. Infinities become NaN, the parts of a number being infinity - infinity.
//
// An operand is kept by blocks of 32 values along the depth, zero past its end, and a block by parts: value i and value
// i + 16 share a word, as the unit takes them. So a row of the left one is [block][part][16 words], a panel of the right
// one [block][part][vector][16 words along the depth][16 columns].
#pragma once

namespace effk {
namespace {

// bfloat16 that make a value as it is stored.
template <class T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : std::is_same_v<T, Half> ? 2 : 1;

constexpr int kMatrixRows = 16, kBlockDepth = 32;

template <class T>
class SplitProduct {
 public:
  using C = float;
  static constexpr bool kSplit = true;
  static constexpr int64_t kSlack = kMatrixRows;  // rows that may be read past the last one of a left operand

  static int64_t padded(int64_t depth) { return ceil_div(depth, kBlockDepth) * kBlockDepth; }
  static int64_t row(int64_t depth) { return ceil_div(depth, kBlockDepth) * kParts<T> * kLine; }
  static int64_t column_vector(int64_t depth) { return ceil_div(depth, kBlockDepth) * kParts<T> * kTile; }
  static int64_t left_size(int64_t count, int64_t depth, bool = false) { return (count + kSlack) * row(depth); }
  static int64_t right_size(int64_t depth) { return kPanelVectors * column_vector(depth); }

  static Rows<C> left(const Rows<C>& rows, int64_t count, const C* gate, C* buffer) {
    const int64_t stride = row(rows.depth);
    if (rows.k_stride == 1)
      split_rows(rows, count, gate, buffer, stride);
    else
      split_columns(rows, count, buffer, stride);
    return {buffer, stride, 1, stride};
  }

  static const C* right(const C* panel, int64_t depth, int vectors, C* out) {
    for (int64_t k = 0; k < depth; k += kBlockDepth, out += vectors * kParts<T> * kTile)
      for (int64_t i = 0; i < kLine; ++i)
        for (int v = 0; v < vectors; ++v) {
          auto value = [&](int64_t at) { return at < depth ? load(panel + (at * vectors + v) * kLine) : VecF{}; };
          split(value(k + i), value(k + i + kLine), out + v * kTile + i * kLine, vectors * kTile);
        }
    return out - vectors * column_vector(depth);
  }

  explicit SplitProduct(int64_t count) : rows_(ceil_div(count, ceil_div(max64(count, 1), kMatrixRows))) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 7; ++i) {
      config.row_bytes[i] = kLine * sizeof(C);
      config.rows[i] = static_cast<uint8_t>(i < 4 ? rows_ : kMatrixRows);
    }
    _tile_loadconfig(&config);
  }
  ~SplitProduct() { _tile_release(); }
  SplitProduct(const SplitProduct&) = delete;

  void store(const Rows<C>& a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row, int64_t out_vector,
             Ahead<C> next = {}) const {
    run<false>(a, count, panel, vectors, out, out_row, out_vector, next);
  }
  void add(const Rows<C>& a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row,
           int64_t out_vector) const {
    run<true>(a, count, panel, vectors, out, out_row, out_vector, {});
  }

 private:
  static constexpr int64_t kLine = kLanes<C>, kTile = kMatrixRows * kLine;  // words

  int64_t rows_;  // of a tile: as even as can be

  // Values 0-15 and 16-31 of a block to words of each part.
  static EFFK_INLINE void split(VecF low, VecF high, C* out, int64_t part) {
    if constexpr (kParts<T> == 1) {  // rounded
      const VecU16 a = bit_cast<VecU16>(_mm512_cvtneps_pbh(low)), b = bit_cast<VecU16>(_mm512_cvtneps_pbh(high));
      store_words(out, __builtin_convertvector(a, VecU) | __builtin_convertvector(b, VecU) << 16);
    } else {
      constexpr uint32_t kUpper = 0xffff0000;
#pragma GCC unroll 3
      for (int i = 0; i < kParts<T>; ++i) {
        const VecU a = bit_cast<VecU>(low), b = bit_cast<VecU>(high);
        store_words(out + i * part, a >> 16 | (b & kUpper));
        low -= bit_cast<VecF>(a & kUpper);
        high -= bit_cast<VecF>(b & kUpper);
      }
    }
  }
  static EFFK_INLINE void store_words(C* out, VecU words) { effk::store(out, bit_cast<VecF>(words)); }

  static void split_rows(const Rows<C>& rows, int64_t count, const C* gate, C* out, int64_t stride) {
    constexpr int64_t kRows = 8;  // at a time, in about the order of memory
    for (int64_t begin = 0; begin < count; begin += kRows)
      for (int64_t k = 0; k < rows.depth; k += kBlockDepth) {
        const int low = static_cast<int>(min64(rows.depth - k, kLine));
        const int high = static_cast<int>(max64(min64(rows.depth - k - kLine, kLine), 0));
        const C *from = rows.at(begin, k), *from_high = high ? rows.at(begin, k + kLine) : from;
        const VecF g = gate ? load_n(gate + k, low) : broadcast(1.0f);
        const VecF g_high = gate && high ? load_n(gate + k + kLine, high) : broadcast(1.0f);
        C* to = out + begin * stride + k / kBlockDepth * kParts<T> * kLine;
        for (int64_t r = 0; r < min64(count - begin, kRows); ++r)
          split(load_n(from + r * rows.stride, low) * g,
                high ? VecF(load_n(from_high + r * rows.stride, high) * g_high) : VecF{}, to + r * stride, kLine);
      }
  }

  // Of rows that lie side by side in memory, whose elements are k_stride apart.
  static void split_columns(const Rows<C>& rows, int64_t count, C* out, int64_t stride) {
    for (int64_t k = 0; k < rows.depth; k += kBlockDepth)
      for (int64_t begin = 0; begin < count; begin += kLine) {
        const int here = static_cast<int>(min64(count - begin, kLine));
        VecF block[2][kLine] = {};
        for (int64_t i = 0; i < min64(rows.depth - k, kBlockDepth); ++i)
          block[i / kLine][i % kLine] = load_n(rows.at(begin, k + i), here);
        transpose<C>(block[0]);
        transpose<C>(block[1]);
        C* to = out + begin * stride + k / kBlockDepth * kParts<T> * kLine;
        for (int i = 0; i < here; ++i) split(block[0][i], block[1][i], to + i * stride, kLine);
      }
  }

  // One tile of rows by V of columns: accumulators are tiles 0 to 2, the left operand is tile 3, the right one 4 to 6.
  template <int V, bool kAdd>
  static void multiply(const Rows<C>& a, const C* row, const C* w, C* out, int64_t out_row, int64_t out_vector,
                       const C* ahead, int64_t lines) {
    asm volatile("" ::: "memory");  // the intrinsics do not say that they read
    const int64_t a_bytes = a.stride * sizeof(C), out_bytes = out_row * sizeof(C);
    if constexpr (kAdd) {
      _tile_loadd(0, out, out_bytes);
      if constexpr (V > 1) _tile_loadd(1, out + out_vector, out_bytes);
      if constexpr (V > 2) _tile_loadd(2, out + 2 * out_vector, out_bytes);
    } else {
      _tile_zero(0);
      if constexpr (V > 1) _tile_zero(1);
      if constexpr (V > 2) _tile_zero(2);
    }
    auto left = [&](int part) EFFK_INLINE { _tile_loadd(3, row + part * kLine, a_bytes); };
    auto right = [&](int part) EFFK_INLINE {
      const C* at = w + part * V * kTile;
      _tile_loadd(4, at, kLine * sizeof(C));
      if constexpr (V > 1) _tile_loadd(5, at + kTile, kLine * sizeof(C));
      if constexpr (V > 2) _tile_loadd(6, at + 2 * kTile, kLine * sizeof(C));
    };
    auto product = [] EFFK_INLINE {
      _tile_dpbf16ps(0, 3, 4);
      if constexpr (V > 1) _tile_dpbf16ps(1, 3, 5);
      if constexpr (V > 2) _tile_dpbf16ps(2, 3, 6);
    };
    for (int64_t begin = 0; begin < a.depth; begin += a.segment, row += a.segment_stride - a.segment) {
      for (int64_t k = min64(a.segment, a.depth - begin); k > 0; k -= kParts<T> * kLine) {
        for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(ahead + i * kLine, 0, 2);
        ahead += lines * kLine;
        // Smaller products first; from each to the next, one operand changes.
        if constexpr (kParts<T> == 3) {
          right(2), left(0), product();
          right(1), product(), left(1), product();
          right(0), product(), left(2), product();
        }
        if constexpr (kParts<T> == 2) {
          right(1), left(0), product();
          right(0), left(1), product();
        }
        if constexpr (kParts<T> == 1) right(0);
        left(0), product();
        row += kParts<T> * kLine;
        w += V * kParts<T> * kTile;
      }
    }
    _tile_stored(0, out, out_bytes);
    if constexpr (V > 1) _tile_stored(1, out + out_vector, out_bytes);
    if constexpr (V > 2) _tile_stored(2, out + 2 * out_vector, out_bytes);
  }

  template <bool kAdd>
  void run(const Rows<C>& a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row, int64_t out_vector,
           Ahead<C> next) const {
    static_assert(kPanelVectors == 3);
    const auto multiply_tile = vectors == 1   ? &multiply<1, kAdd>
                               : vectors == 2 ? &multiply<2, kAdd>
                                              : &multiply<3, kAdd>;
    const int64_t blocks = a.depth / (kParts<T> * kLine), size = vectors * blocks * kParts<T> * kTile;
    if (!next.data) next = {panel + size, size};
    const int64_t lines = ceil_div(next.size, max64(ceil_div(count, rows_) * blocks, 1) * kLine);
    const C *row = a.data, *ahead = next.data;
    for (int64_t i = 0; i < count; i += rows_, row += rows_ * a.stride, ahead += lines * blocks * kLine) {
      const int64_t here = min64(count - i, rows_);
      C* to = out + i * out_row;
      if (here == rows_) {
        multiply_tile(a, row, panel, to, out_row, out_vector, ahead, lines);
        continue;
      }
      // A whole tile would write past the last row.
      C rest[kPanelVectors * kTile];
      auto copy = [&](const C* from, int64_t from_row, int64_t from_vector, C* into, int64_t into_row, int64_t into_vector) {
        for (int64_t r = 0; r < here; ++r)
          for (int v = 0; v < vectors; ++v)
            effk::store(into + r * into_row + v * into_vector, load(from + r * from_row + v * from_vector));
      };
      if (kAdd) copy(to, out_row, out_vector, rest, kLine, kTile);
      multiply_tile(a, row, panel, rest, kLine, kTile, ahead, lines);
      copy(rest, kLine, kTile, to, out_row, out_vector);
    }
  }
};

}  // namespace
}  // namespace effk
