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
// Runs of kRun values are summed in C, the runs in double.
constexpr int64_t kRun = 32;

template <class C>
struct Sums {
  Vec<C> origin{}, run_sum{}, run_square{};
  double sum[kLanes<C>] = {}, square[kLanes<C>] = {};

  void end_run() {
    for (int i = 0; i < kLanes<C>; ++i) {
      sum[i] += run_sum[i];
      square[i] += run_square[i];
    }
    run_sum = run_square = Vec<C>{};
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

// A block of rows of vectors, from `in` to `out`; strides are in elements. A vector's lanes are `lane_stride` apart in
// memory of `in`, next to each other in `out`. The last vector of a row has `last_lanes`; what lies past them in `out`
// is left alone. Where lanes are channels a row is one pixel, so that a map is walked through in the order of memory.
template <class In, class Out>
struct Block {
  const In* in;
  int64_t in_row, in_vector, lane_stride;
  Out* out;
  int64_t out_row, out_vector;
  int64_t rows, vectors;
  int last_lanes;
  int64_t scale_step = 0;  // from one vector's scale and sums to the next's: 0 or 1
  int64_t ahead = 0;       // to what is read next, which is fetched meanwhile
};

template <class In, class Out>
using Transform = void (*)(const Block<In, Out>&, const Scale<compute_t<In>>*, Sums<compute_t<In>>*);

// out = act(scale(in)), and sums of it as stored. Where `out` is null nothing is stored.
template <class In, class Out, int A, bool kSum>
void transform(const Block<In, Out>& b, const Scale<compute_t<In>>* scales, Sums<compute_t<In>>* sums) {
  using C = compute_t<In>;
  const int64_t whole = b.vectors - (b.last_lanes < kLanes<C>);
  for (int64_t row = 0; row < b.rows; ++row) {
    const In* in = b.in + row * b.in_row;
    Out* out = b.out ? b.out + row * b.out_row : nullptr;
    auto one = [&](int64_t i, Vec<C> v, int lanes) EFFK_INLINE {
      const Vec<C> z = activate<A>(scales[i * b.scale_step](v));
      if (out) store_n(out + i * b.out_vector, z, lanes);
      if (!kSum) return;
      Sums<C>& s = sums[i * b.scale_step];
      const Vec<C> deviation = keep_n<C>(rounded<Out>(z) - s.origin, lanes);
      s.run_sum += deviation;
      s.run_square += deviation * deviation;
    };
    auto runs = [&](auto load) EFFK_INLINE {
      for (int64_t begin = 0; begin < whole; begin += kRun) {
        const int64_t end = min64(begin + kRun, whole);
        for (int64_t i = begin; i < end; ++i) one(i, load(in + i * b.in_vector, kLanes<C>), kLanes<C>);
        if (kSum && b.scale_step == 0) sums->end_run();
      }
      if (whole < b.vectors) one(whole, load(in + whole * b.in_vector, b.last_lanes), b.last_lanes);
    };
    if (b.lane_stride == 1)
      runs([&](const In* at, int lanes) EFFK_INLINE {
        __builtin_prefetch(at + b.ahead, 0, 2);
        return load_n(at, lanes);
      });
    else
      runs([&](const In* at, int lanes) EFFK_INLINE { return load_strided(at, b.lane_stride, lanes); });
    if (kSum && (b.scale_step == 0 || (row + 1) % kRun == 0 || row + 1 == b.rows))
      for (int64_t i = 0; i < (b.scale_step ? b.vectors : 1); ++i) sums[i].end_run();
  }
}

template <class In, class Out>
Transform<In, Out> transform_for(int activation, bool sums) {
  Transform<In, Out> chosen = nullptr;
  with_activation(activation, [&](auto act) {
    chosen = sums ? &transform<In, Out, act, true> : &transform<In, Out, act, false>;
  });
  return chosen;
}

// Transposes kLanes vectors in place.
template <class C>
inline EFFK_INLINE void transpose(Vec<C>* rows) {
  constexpr int V = kLanes<C>;
  Lanes<C> low, high;  // interleave the lower, the upper halves of two vectors
  for (int i = 0; i < V; ++i) {
    low[i] = i / 2 + i % 2 * V;
    high[i] = low[i] + V / 2;
  }
  // Each of the log2(V) perfect shuffles of rows i and i + V / 2 moves one bit of the row's number to the lane's.
#pragma GCC unroll 4
  for (int step = 1; step < V; step *= 2) {
    Vec<C> next[V];
#pragma GCC unroll 8
    for (int i = 0; i < V / 2; ++i) {
      next[2 * i] = shuffle<C>(rows[i], rows[i + V / 2], low);
      next[2 * i + 1] = shuffle<C>(rows[i], rows[i + V / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) rows[i] = next[i];
  }
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

}  // namespace
}  // namespace effk
