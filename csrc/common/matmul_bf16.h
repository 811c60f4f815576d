// Operands of products of bfloat16, which are added up in float. Only inside matmul.h.
//
// Values stand in pairs along the depth, in words of two, with zeros up to a multiple of kBlock values. A row of the left
// operand is as it would be in memory; a panel of the right one is [block][vector][pairs of the block][16 columns]. Sizes
// are in words.
#pragma once

namespace effk {
namespace {

template <int64_t kBlock, int64_t kRowsPast>
class Bfloat16Operands {
 public:
  using C = float;
  static constexpr bool kOwnOperands = true;
  static constexpr int64_t kSlack = kRowsPast;  // rows that may be read past the last one of a left operand

  static int64_t padded(int64_t depth) { return ceil_div(depth, kBlock) * kBlock; }
  static int64_t row(int64_t depth) { return padded(depth) / 2; }
  static int64_t column_vector(int64_t depth) { return padded(depth) / 2 * kLine; }
  // Whole lines, so that what lies after it is aligned.
  static int64_t left_size(int64_t count, int64_t depth, bool = false) {
    return round_up<C>((count + kSlack) * row(depth));
  }
  static int64_t right_size(int64_t depth) { return kPanelVectors * column_vector(depth); }

  static Rows<C> left(const Rows<C>& rows, int64_t count, const C* gate, C* buffer) {
    if (rows.k_stride == 1)
      round_rows(rows, count, gate, buffer);
    else
      round_columns(rows, count, buffer);
    return {buffer, row(rows.depth), 1, row(rows.depth)};
  }
  // `count` rows of bfloat16, `row_stride` apart.
  static Rows<C> left(const BFloat16* rows, int64_t row_stride, int64_t depth, int64_t count, C* buffer) {
    const int64_t words = row(depth);
    for (int64_t k = 0; k < depth; k += kStep) {
      const uint32_t values = ~0u >> (kStep - min64(depth - k, kStep));
      const uint16_t pairs = 0xffffu >> (kLine - min64(words - k / 2, kLine));
      for (int64_t r = 0; r < count; ++r)
        _mm512_mask_storeu_epi32(buffer + r * words + k / 2, pairs,
                                 _mm512_maskz_loadu_epi16(values, rows + r * row_stride + k));
    }
    return {buffer, words, 1, words};
  }

  static const C* right(const C* panel, int64_t depth, int vectors, C* out) {
    C* to = out;
    for (int64_t k = 0; k < depth; k += kBlock, to += vectors * kTile)
      for (int64_t i = 0; i < kBlock / 2; ++i)
        for (int v = 0; v < vectors; ++v) {
          auto value = [&](int64_t at) EFFK_INLINE {
            const VecF z = at < depth ? load(panel + (at * vectors + v) * kLine) : VecF{};
            return __builtin_convertvector(bit_cast<VecU16>(_mm512_cvtneps_pbh(z)), VecU);
          };
          store(to + v * kTile + i * kLine, bit_cast<VecF>(value(k + 2 * i) | value(k + 2 * i + 1) << 16));
        }
    return out;
  }

 protected:
  static constexpr int64_t kLine = kLanes<C>, kTile = kBlock / 2 * kLine;

 private:
  static constexpr int64_t kStep = 2 * kLine;  // values that are rounded at once

  // The first `words`, of two vectors of values.
  static EFFK_INLINE void store_pairs(C* out, VecF low, VecF high, int64_t words) {
    store_n(out, bit_cast<VecF>(_mm512_cvtne2ps_pbh(high, low)), static_cast<int>(min64(words, kLine)));
  }

  static void round_rows(const Rows<C>& rows, int64_t count, const C* gate, C* out) {
    const int64_t step = rows.segment < rows.depth ? count : 8;  // rows at a time, in about the order of memory
    const int64_t stride = row(rows.depth);
    for (int64_t begin = 0; begin < count; begin += step)
      for (int64_t k = 0; k < rows.depth; k += kStep) {
        const int low = static_cast<int>(min64(rows.depth - k, kLine));
        const int high = static_cast<int>(max64(min64(rows.depth - k - kLine, kLine), 0));
        const C *from = rows.at(begin, k), *from_high = high ? rows.at(begin, k + kLine) : from;
        const VecF g = gate ? load_n(gate + k, low) : broadcast(1.0f);
        const VecF g_high = gate && high ? load_n(gate + k + kLine, high) : broadcast(1.0f);
        for (int64_t r = 0; r < min64(count - begin, step); ++r)
          store_pairs(out + (begin + r) * stride + k / 2, load_n(from + r * rows.stride, low) * g,
                      high ? VecF(load_n(from_high + r * rows.stride, high) * g_high) : VecF{}, stride - k / 2);
      }
  }

  // Of rows that lie side by side in memory, whose elements are k_stride apart.
  static void round_columns(const Rows<C>& rows, int64_t count, C* out) {
    const int64_t stride = row(rows.depth);
    for (int64_t k = 0; k < rows.depth; k += kStep)
      for (int64_t begin = 0; begin < count; begin += kLine) {
        const int here = static_cast<int>(min64(count - begin, kLine));
        VecF block[2][kLine] = {};
        for (int64_t i = 0; i < min64(rows.depth - k, kStep); ++i)
          block[i / kLine][i % kLine] = load_n(rows.at(begin, k + i), here);
        transpose<C>(block[0]);
        transpose<C>(block[1]);
        for (int i = 0; i < here; ++i)
          store_pairs(out + (begin + i) * stride + k / 2, block[0][i], block[1][i], stride - k / 2);
      }
  }
};

}  // namespace
}  // namespace effk

#if defined(__AMX_BF16__)
#include "matmul_amx.h"
#endif

namespace effk {
namespace {

#if defined(__AMX_BF16__)
using Bfloat16Product = AmxProduct;
#else
// A step of the depth: a pair of values of each row, and its products with a vector of pairs.
struct PairMultiplyAdd {
  using C = float;
  static EFFK_INLINE VecF left(const C* at) {
    uint32_t pair;
    __builtin_memcpy(&pair, at, sizeof(pair));
    return bit_cast<VecF>(VecU{} + pair);
  }
  static EFFK_INLINE VecF add(VecF sum, VecF a, VecF b) {
    return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
  }
};

class Bfloat16Product : public Bfloat16Operands<2, 0>, public TiledProduct<PairMultiplyAdd> {
 public:
  using C = float;
  using TiledProduct<PairMultiplyAdd>::TiledProduct;

  static bool takes(const Map& x) { return x.stride_c == 1 && x.c % 2 == 0 && x.stride_w % 2 == 0; }
  static Rows<C> in_place(const BFloat16* x, int64_t stride, int64_t, int64_t depth) {
    return {reinterpret_cast<const C*>(x), stride / 2, 1, depth / 2};
  }
};
#endif

}  // namespace
}  // namespace effk
