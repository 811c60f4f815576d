#include "cpu_kernel.h"

#include "vec_map.h"

namespace effk {
namespace {

constexpr int64_t kBandElements = 64 << 10;
constexpr int64_t kRun = 128;  // pixels summed in single precision before they are added to the unit's sums

// Lanes are channels: all channels of a pixel, then the next pixel, in the order of memory. Scale, shift and sums of
// all channels stand in scratch, [vectors] each.
template <class T, int A, bool kSum>
void run_channels_last(const MapPassParams& p, int64_t unit, void* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int64_t n = unit / p.bands, band = unit % p.bands;
  const int64_t first = band * p.band_rows, rows = min64(p.band_rows, p.x.h - first);
  const int64_t vectors = ceil_div(p.x.c, V);
  Sums<C>* sums = static_cast<Sums<C>*>(scratch);
  Scale<C>* scales = reinterpret_cast<Scale<C>*>(sums + vectors);
  Vec<C>* run_sum = reinterpret_cast<Vec<C>*>(scales + vectors);
  Vec<C>* run_square = run_sum + vectors;

  Affine affine = p.affine;
  if (affine.scale) affine.scale = static_cast<const C*>(affine.scale) + n * p.image_stride;
  auto lanes_at = [&](int64_t v) EFFK_INLINE { return static_cast<int>(min64(p.x.c - v * V, V)); };
  auto read = [&](const T* pixel, int64_t v, int lanes) EFFK_INLINE {
    return p.x.stride_c == 1 ? load_n(pixel + v * V, lanes)
                             : load_strided(pixel + v * V * p.x.stride_c, p.x.stride_c, lanes);
  };
  for (int64_t v = 0; v < vectors; ++v) {
    scales[v] = Scale<C>::lanes(affine, v * V, lanes_at(v));
    sums[v] = Sums<C>{};
    run_sum[v] = run_square[v] = Vec<C>{};
    if (kSum) {
      const Vec<C> value = read(row_of<T>(p.x, n, 0, first), v, lanes_at(v));
      sums[v].origin = origin_of<C>(p.reduce, rounded<T>(activate<A>(scales[v](value))));
    }
  }
  for (int64_t row = first; row < first + rows; ++row) {
    const T* x = row_of<T>(p.x, n, 0, row);
    T* y = static_cast<T*>(p.y) + (p.y ? (n * p.x.h + row) * p.x.w * p.x.c : 0);
    for (int64_t begin = 0; begin < p.x.w; begin += kRun) {
      const int64_t end = min64(begin + kRun, p.x.w);
      for (int64_t i = begin; i < end; ++i) {
        auto one = [&](int64_t v, int lanes) EFFK_INLINE {
          const Vec<C> z = activate<A>(scales[v](read(x + i * p.x.stride_w, v, lanes)));
          if (p.y) store_n(y + i * p.x.c + v * V, z, lanes);
          if (!kSum) return;
          const Vec<C> deviation = rounded<T>(z) - sums[v].origin;
          run_sum[v] += deviation;
          run_square[v] += deviation * deviation;
        };
        for (int64_t v = 0; v < p.x.c / V; ++v) one(v, V);
        if (p.x.c % V) one(vectors - 1, lanes_at(vectors - 1));
      }
      if (kSum)
        for (int64_t v = 0; v < vectors; ++v) {
          sums[v].add(run_sum[v], run_square[v]);
          run_sum[v] = run_square[v] = Vec<C>{};
        }
    }
  }
  if (!kSum) return;
  for (int64_t c = 0; c < p.x.c; ++c) {
    const Sums<C>& s = sums[c / V];
    write_partial(p.partials, p.reduce, p.x.c, unit, c, s.origin[c % V], s.sum[c % V], s.square[c % V],
                  static_cast<double>(rows * p.x.w));
  }
}

// Lanes are columns; a plane without gaps between its rows is one long row, taken in runs.
template <class T>
void run_plane(const MapPassParams& p, int64_t unit) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int64_t n = unit / p.x.c, c = unit % p.x.c;
  Affine affine = p.affine;
  if (affine.scale) affine.scale = static_cast<const C*>(affine.scale) + n * p.image_stride;
  const Scale<C> scale = Scale<C>::one(affine, c);
  const bool wanted = p.reduce != Reduce::kNone;
  const T* x = row_of<T>(p.x, n, c, 0);
  T* y = p.y ? static_cast<T*>(p.y) + unit * p.x.h * p.x.w : nullptr;
  Sums<C> sums;
  if (p.reduce == Reduce::kStatistics) {
    C first[V];
    transform_for<T, C>(affine.activation, false)({x, 0, 0, 0, first, 0, 0, 1, 1, 1, 1}, scale, nullptr);
    sums.origin = origin_of<C>(p.reduce, rounded<T>(broadcast(first[0])));
  }
  const bool dense = p.x.stride_h == p.x.w * p.x.stride_w;
  const int64_t row_length = dense ? p.x.h * p.x.w : p.x.w;
  const Transform<T, T> run = transform_for<T, T>(affine.activation, wanted);
  for (int64_t i = 0; i < row_length; i += kRun * V) {
    const int64_t count = min64(row_length - i, kRun * V);
    const int last = static_cast<int>((count - 1) % V + 1);
    run({x + i * p.x.stride_w, p.x.stride_h, V * p.x.stride_w, p.x.stride_w, y ? y + i : nullptr, p.x.w, V,
         dense ? 1 : p.x.h, ceil_div(count, V), V, last},
        scale, &sums);
  }
  if (!wanted) return;
  double sum = 0, square = 0;
  for (int i = 0; i < V; ++i) {
    sum += sums.sum[i];
    square += sums.square[i];
  }
  write_partial(p.partials, p.reduce, p.x.c, n, c, sums.origin[0], sum, square, static_cast<double>(p.x.h * p.x.w));
}

template <class C>
void plan(MapPassParams& p) {
  p.band_rows = p.channels_last ? max64(min64(kBandElements / (p.x.w * p.x.c), p.x.h), 1) : p.x.h;
  p.bands = ceil_div(p.x.h, p.band_rows);
  p.units = p.x.n * (p.channels_last ? p.bands : p.x.c);
  const int64_t per_vector = sizeof(Sums<C>) + sizeof(Scale<C>) + 2 * sizeof(Vec<C>);
  p.scratch_size = p.channels_last ? ceil_div(p.x.c, kLanes<C>) * per_vector : 0;
}

}  // namespace

namespace EFFK_ISA {

void map_pass_plan(MapPassParams& p) { p.dtype == Dtype::kFloat64 ? plan<double>(p) : plan<float>(p); }

void map_pass_run(const MapPassParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    if (!p.channels_last)
      for (int64_t i = first_unit; i < last_unit; ++i) run_plane<T>(p, i);
    else
      with_activation(p.affine.activation, [&](auto act) {
        const auto run = p.reduce == Reduce::kNone ? &run_channels_last<T, act, false> : &run_channels_last<T, act, true>;
        for (int64_t i = first_unit; i < last_unit; ++i) run(p, i, scratch);
      });
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
