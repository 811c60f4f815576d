// What the CPU kernels that walk over a feature map share. Only inside csrc/*/cpu_kernel.cpp, as vec.h.
#pragma once

#include "vec.h"

namespace effk {
namespace {

template <class C>
constexpr int64_t round_up(int64_t n) {
  return (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
inline const T* row_of(const Map& x, int64_t n, int64_t c, int64_t row) {
  return static_cast<const T*>(x.data) + n * x.stride_n + c * x.stride_c + row * x.stride_h;
}

// Scale and shift of `lanes` channels from c on, or of channel c in every lane.
template <class C>
struct Scale {
  Vec<C> scale, shift;
  static EFFK_INLINE Scale lanes(const Affine& a, int64_t c, int n) {
    const C *scale = static_cast<const C*>(a.scale), *shift = static_cast<const C*>(a.shift);
    return {scale ? load_n(scale + c, n) : broadcast(C(1)), shift ? load_n(shift + c, n) : Vec<C>{}};
  }
  static EFFK_INLINE Scale one(const Affine& a, int64_t c) {
    const C *scale = static_cast<const C*>(a.scale), *shift = static_cast<const C*>(a.shift);
    return {broadcast(scale ? scale[c] : C(1)), broadcast(shift ? shift[c] : C(0))};
  }
  EFFK_INLINE Vec<C> operator()(Vec<C> z) const { return z * scale + shift; }
};

// Sums of values as stored and of their squares, about `origin`: a channel in each lane, or one channel in all lanes.
// Short runs are summed in C, all of them in double.
template <class C>
struct Sums {
  Vec<C> origin{};
  double sum[kLanes<C>] = {}, square[kLanes<C>] = {};

  EFFK_INLINE void add(Vec<C> run_sum, Vec<C> run_square) {
    for (int i = 0; i < kLanes<C>; ++i) {
      sum[i] += run_sum[i];
      square[i] += run_square[i];
    }
  }
};

// The sums of `count` values of channel c for merge_partials: [partial][2][channels].
inline void write_partial(double* partials, Reduce reduce, int64_t channels, int64_t partial, int64_t c, double origin,
                          double sum, double square, double count) {
  double* out = partials + partial * 2 * channels + c;
  const bool statistics = reduce == Reduce::kStatistics;
  const double spread = square - sum * sum / count;
  out[0] = statistics ? origin + sum / count : sum;
  out[channels] = statistics ? (spread < 0 ? 0 : spread) : 0;
}

// What statistics are taken about: the first value as stored. If that is infinite, zero: deviations from it would all
// be NaN.
template <class C>
inline EFFK_INLINE Vec<C> origin_of(Reduce reduce, Vec<C> first) {
  if (reduce != Reduce::kStatistics) return Vec<C>{};
  return first - first == Vec<C>{} ? first : Vec<C>{};
}

// A run of n vectors: y[i * stride] = act(scale(in[i * in_stride])), nothing stored where y is null. The vectors have
// `lanes` lanes, the last one `last_lanes`.
template <class T, int A, bool kSum, class In>
inline EFFK_INLINE void transform(const In* in, int64_t in_stride, int64_t n, T* y, int64_t stride, int lanes, int last_lanes,
                                 const Scale<compute_t<T>>& scale, Sums<compute_t<T>>& sums) {
  using C = compute_t<T>;
  Vec<C> sum{}, square{};
  const Vec<C> origin = sums.origin;
  auto one = [&](int64_t i, int count) EFFK_INLINE {
    const Vec<C> z = activate<A>(scale(load_n(in + i * in_stride, count)));
    if (y) store_n(y + i * stride, z, count);
    if (!kSum) return;
    const Vec<C> deviation = keep_n<C>(rounded<T>(z) - origin, count);
    sum += deviation;
    square += deviation * deviation;
  };
  const int64_t whole = lanes == kLanes<C> ? n - (last_lanes != lanes) : 0;
  for (int64_t i = 0; i < whole; ++i) one(i, kLanes<C>);
  for (int64_t i = whole; i < n; ++i) one(i, i == n - 1 ? last_lanes : lanes);
  if (kSum) sums.add(sum, square);
}

// f(T{}) for the storage type given at run time.
template <class F>
void with_storage(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kFloat16: return f(Half{});
    case Dtype::kBFloat16: return f(BFloat16{});
    case Dtype::kFloat64: return f(double{});
  }
}

// f(Constant<activation>, Constant<whether sums are wanted>)
template <class F>
inline void with_epilogue(int activation, Reduce reduce, F f) {
  with_activation(activation, [&](auto act) EFFK_INLINE {
    reduce == Reduce::kNone ? f(act, Constant<false>{}) : f(act, Constant<true>{});
  });
}

}  // namespace
}  // namespace effk
