// Products of bfloat16 on the matrix unit of x86 processors (AMX), in blocks of the depth of 32: a panel is as the unit
// takes it. Only inside matmul_bf16.h.
#pragma once

namespace effk {
namespace {

class AmxProduct : public Bfloat16Operands<32, 16> {
 public:
  // Rows that lie in memory have no slack after them.
  static bool takes(const Map&) { return false; }
  static Rows<C> in_place(const BFloat16*, int64_t, int64_t, int64_t depth) { return {nullptr, 0, 1, depth}; }

  // Configures the thread's tiles, as whoever uses them does.
  explicit AmxProduct(int64_t) {
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
  static constexpr int64_t kTileSize = 16;

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
