// Products of bfloat16 on the matrix unit of x86 processors (AMX), which adds up in float. Only inside matmul.h.
//
// Operands are bfloat16, 32 values of the depth at a time, zero past its end. A row of the left one is as it would be in
// memory; a panel of the right one is [block of 32][vector][16 pairs along the depth][16 columns], as the unit takes it.
// Sizes are in words of two values.
#pragma once

namespace effk {
namespace {

class Bfloat16Product {
 public:
  using C = float;
  static constexpr bool kOwnOperands = true;
  static constexpr int64_t kSlack = 16;  // rows that may be read past the last one of a left operand

  static int64_t padded(int64_t depth) { return ceil_div(depth, kBlock) * kBlock; }
  static int64_t row(int64_t depth) { return padded(depth) / 2; }
  static int64_t column_vector(int64_t depth) { return padded(depth) / 2 * kLine; }
  static int64_t left_size(int64_t count, int64_t depth, bool = false) { return (count + kSlack) * row(depth); }
  static int64_t right_size(int64_t depth) { return kPanelVectors * column_vector(depth); }

  static Rows<C> left(const Rows<C>& rows, int64_t count, const C* gate, C* buffer) {
    if (rows.k_stride == 1)
      round_rows(rows, count, gate, buffer);
    else
      round_columns(rows, count, buffer);
    return {buffer, row(rows.depth), 1, row(rows.depth)};
  }

  static const C* right(const C* panel, int64_t depth, int vectors, C* out) {
    C* to = out;
    for (int64_t k = 0; k < depth; k += kBlock, to += vectors * kTile)
      for (int64_t i = 0; i < kLine; ++i)
        for (int v = 0; v < vectors; ++v) {
          auto value = [&](int64_t at) EFFK_INLINE {
            const VecF z = at < depth ? load(panel + (at * vectors + v) * kLine) : VecF{};
            return __builtin_convertvector(bit_cast<VecU16>(_mm512_cvtneps_pbh(z)), VecU);
          };
          effk::store(to + v * kTile + i * kLine, bit_cast<VecF>(value(k + 2 * i) | value(k + 2 * i + 1) << 16));
        }
    return out;
  }

  // Configures the thread's tiles, as whoever uses them does.
  explicit Bfloat16Product(int64_t) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }

  void store(const Rows<C>& a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row, int64_t out_vector,
             Ahead<C> next = {}) const {
    run<false>(a, count, panel, vectors, out, out_row, out_vector, next);
  }
  void add(const Rows<C>& a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row,
           int64_t out_vector) const {
    run<true>(a, count, panel, vectors, out, out_row, out_vector, {});
  }

 private:
  static constexpr int64_t kBlock = 32, kTileSize = 16, kLine = kLanes<C>, kTile = kTileSize * kLine;

  static EFFK_INLINE void store_pair(C* out, VecF low, VecF high) {
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    __builtin_memcpy(out, &both, sizeof(both));
  }

  static void round_rows(const Rows<C>& rows, int64_t count, const C* gate, C* out) {
    constexpr int64_t kRows = 8;  // at a time, in about the order of memory
    const int64_t stride = row(rows.depth);
    for (int64_t begin = 0; begin < count; begin += kRows)
      for (int64_t k = 0; k < rows.depth; k += kBlock) {
        const int low = static_cast<int>(min64(rows.depth - k, kLine));
        const int high = static_cast<int>(max64(min64(rows.depth - k - kLine, kLine), 0));
        const C *from = rows.at(begin, k), *from_high = high ? rows.at(begin, k + kLine) : from;
        const VecF g = gate ? load_n(gate + k, low) : broadcast(1.0f);
        const VecF g_high = gate && high ? load_n(gate + k + kLine, high) : broadcast(1.0f);
        for (int64_t r = 0; r < min64(count - begin, kRows); ++r)
          store_pair(out + (begin + r) * stride + k / 2, load_n(from + r * rows.stride, low) * g,
                     high ? VecF(load_n(from_high + r * rows.stride, high) * g_high) : VecF{});
      }
  }

  // Of rows that lie side by side in memory, whose elements are k_stride apart.
  static void round_columns(const Rows<C>& rows, int64_t count, C* out) {
    const int64_t stride = row(rows.depth);
    for (int64_t k = 0; k < rows.depth; k += kBlock)
      for (int64_t begin = 0; begin < count; begin += kLine) {
        const int here = static_cast<int>(min64(count - begin, kLine));
        VecF block[2][kLine] = {};
        for (int64_t i = 0; i < min64(rows.depth - k, kBlock); ++i)
          block[i / kLine][i % kLine] = load_n(rows.at(begin, k + i), here);
        transpose<C>(block[0]);
        transpose<C>(block[1]);
        for (int i = 0; i < here; ++i) store_pair(out + (begin + i) * stride + k / 2, block[0][i], block[1][i]);
      }
  }

  // The instructions, with tiles as constants; strides are of their rows.
  template <int Tile>
  static EFFK_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
  }
  template <int Tile>
  static EFFK_INLINE void tile_load(const C* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(Tile), "r"(from), "r"(stride * sizeof(C)) : "memory");
  }
  template <int Tile>
  static EFFK_INLINE void tile_store(C* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(Tile), "r"(to), "r"(stride * sizeof(C)) : "memory");
  }
  template <int Sum, int Left, int Right>
  static EFFK_INLINE void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
  }

  // Where a tile of the product goes.
  struct Target {
    C* out;
    int64_t row, vector;
  };

  // f(Constant<0>{}), ..., f(Constant<N - 1>{})
  template <int N, class F>
  static EFFK_INLINE void for_constants(F f) {
    if constexpr (N > 1) for_constants<N - 1>(f);
    f(Constant<N - 1>{});
  }

  // R tiles of rows by V of columns: R * V sums, R left and V right operands are all in tiles. Fetches `lines` of what is
  // `ahead` per block of the depth.
  template <int R, int V, bool kAdd>
  static void multiply(const Rows<C>& a, const C* row, const C* w, const Target* to, const C* ahead, int64_t lines) {
    constexpr int kLeft = R * V, kRight = kLeft + R;
    static_assert(kRight + V <= 8);
    for_constants<R * V>([&](auto i) EFFK_INLINE {
      const Target& t = to[i / V];
      if constexpr (kAdd)
        tile_load<i>(t.out + i % V * t.vector, t.row);
      else
        tile_zero<i>();
    });
    for (int64_t begin = 0; begin < a.depth; begin += a.segment, row += a.segment_stride - a.segment)
      for (int64_t k = min64(a.segment, a.depth - begin); k > 0; k -= kLine, row += kLine, w += V * kTile) {
        for (int64_t i = 0; i < lines; ++i, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
        for_constants<R>([&](auto r) EFFK_INLINE { tile_load<kLeft + r>(row + r * kTileSize * a.stride, a.stride); });
        for_constants<V>([&](auto v) EFFK_INLINE {
          tile_load<kRight + v>(w + v * kTile, kLine);
          for_constants<R>([&](auto r) EFFK_INLINE { tile_multiply<r * V + v, kLeft + r, kRight + v>(); });
        });
      }
    for_constants<R * V>([&](auto i) EFFK_INLINE {
      const Target& t = to[i / V];
      tile_store<i>(t.out + i % V * t.vector, t.row);
    });
  }

  template <bool kAdd>
  static void run(const Rows<C>& a, int64_t count, const C* panel, int vectors, C* out, int64_t out_row,
                  int64_t out_vector, Ahead<C> next) {
    using Multiply = void (*)(const Rows<C>&, const C*, const C*, const Target*, const C*, int64_t);
    // By vectors and tiles of rows.
    static_assert(kPanelVectors == 3);
    constexpr Multiply kVariants[3][3] = {{&multiply<1, 1, kAdd>, &multiply<2, 1, kAdd>, &multiply<3, 1, kAdd>},
                                          {&multiply<1, 2, kAdd>, &multiply<2, 2, kAdd>, nullptr},
                                          {&multiply<1, 3, kAdd>, nullptr, nullptr}};
    const int64_t most = 4 - vectors, tiles = ceil_div(count, kTileSize), calls = ceil_div(tiles, most);
    const int64_t blocks = a.depth / kLine, size = vectors * blocks * kTile;
    if (!next.data) next = {panel + size, size};
    const int64_t lines = ceil_div(next.size, max64(calls * blocks, 1) * kLine);
    for (int64_t call = 0; call < calls; ++call) {
      const int64_t begin = call * tiles / calls, end = (call + 1) * tiles / calls;
      Target targets[3];
      for (int64_t i = begin; i < end; ++i) targets[i - begin] = {out + i * kTileSize * out_row, out_row, out_vector};
      // The last tile, where not all of its rows are wanted.
      C rest[kPanelVectors * kTile];
      const Target whole{rest, kLine, kTile}, last = targets[end - begin - 1];
      const int64_t here = count - (end - 1) * kTileSize;
      auto copy = [&](const Target& from, const Target& to) {
        for (int64_t r = 0; r < here; ++r)
          for (int v = 0; v < vectors; ++v)
            effk::store(to.out + v * to.vector + r * to.row, load(from.out + v * from.vector + r * from.row));
      };
      if (here < kTileSize) {
        if (kAdd) copy(last, whole);
        targets[end - begin - 1] = whole;
      }
      kVariants[vectors - 1][end - begin - 1](a, a.data + begin * kTileSize * a.stride, panel, targets,
                                              next.data + call * blocks * lines * kLine, lines);
      if (here < kTileSize) copy(whole, last);
    }
  }
};

}  // namespace
}  // namespace effk
