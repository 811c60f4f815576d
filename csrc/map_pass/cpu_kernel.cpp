#include "cpu_kernel.h"

#include "vec_map.h"

namespace effk {
namespace {

constexpr int64_t kBandElements = 64 << 10;

// The affine map of image n.
template <class C>
Affine affine_of(const MapPassParams& p, int64_t n) {
  Affine affine = p.affine;
  if (affine.scale) affine.scale = static_cast<const C*>(affine.scale) + n * p.image_stride;
  return affine;
}

// Lanes are channels: all channels of a pixel, then the next pixel, in the order of memory. Scale and sums of all
// channels stand in scratch, [vectors] each.
template <class T>
void run_channels_last(const MapPassParams& p, int64_t unit, void* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int64_t n = unit / p.bands, band = unit % p.bands;
  const int64_t first = band * p.band_rows, rows = min64(p.band_rows, p.x.h - first);
  const int64_t vectors = ceil_div(p.x.c, V);
  const int last_lanes = static_cast<int>((p.x.c - 1) % V + 1);
  Sums<C>* sums = static_cast<Sums<C>*>(scratch);
  Scale<C>* scales = reinterpret_cast<Scale<C>*>(sums + vectors);
  Vec<C>* origins = reinterpret_cast<Vec<C>*>(scales + vectors);

  const Affine affine = affine_of<C>(p, n);
  for (int64_t v = 0; v < vectors; ++v) {
    scales[v] = Scale<C>::lanes(affine, v * V, v < vectors - 1 ? V : last_lanes);
    sums[v] = Sums<C>{};
  }
  const T* x = row_of<T>(p.x, n, 0, first);
  if (p.reduce == Reduce::kStatistics) {
    const Transform<T, C> one_pixel = transform_for<T, C>(affine.activation, false);
    C* origin = reinterpret_cast<C*>(origins);
    one_pixel({x, 0, V * p.x.stride_c, p.x.stride_c, origin, 0, V, 1, vectors, last_lanes, 1}, scales, nullptr);
    for (int64_t v = 0; v < vectors; ++v) sums[v].origin = origin_of<C>(p.reduce, rounded<T>(origins[v]));
  }
  const bool wanted = p.reduce != Reduce::kNone;
  const Transform<T, T> run = transform_for<T, T>(affine.activation, wanted);
  for (int64_t row = 0; row < rows; ++row, x += p.x.stride_h) {
    T* y = p.y ? static_cast<T*>(p.y) + (n * p.x.h + first + row) * p.x.w * p.x.c : nullptr;
    run({x, p.x.stride_w, V * p.x.stride_c, p.x.stride_c, y, p.x.c, V, p.x.w, vectors, last_lanes, 1}, scales, sums);
  }
  if (!wanted) return;
  for (int64_t c = 0; c < p.x.c; ++c) {
    const Sums<C>& s = sums[c / V];
    write_partial(p.partials, p.reduce, p.x.c, unit, c, s.origin[c % V], s.sum[c % V], s.square[c % V],
                  static_cast<double>(rows * p.x.w));
  }
}

// Lanes are columns; a plane without gaps between its rows is one long row.
template <class T>
void run_plane(const MapPassParams& p, int64_t unit) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int64_t n = unit / p.x.c, c = unit % p.x.c;
  const Affine affine = affine_of<C>(p, n);
  const Scale<C> scale = Scale<C>::one(affine, c);
  const bool wanted = p.reduce != Reduce::kNone;
  const T* x = row_of<T>(p.x, n, c, 0);
  T* y = p.y ? static_cast<T*>(p.y) + unit * p.x.h * p.x.w : nullptr;
  Sums<C> sums;
  if (p.reduce == Reduce::kStatistics) {
    C first[V];
    transform_for<T, C>(affine.activation, false)({x, 0, 0, 1, first, 0, 0, 1, 1, 1, 0}, &scale, nullptr);
    sums.origin = origin_of<C>(p.reduce, rounded<T>(broadcast(first[0])));
  }
  const bool dense = p.x.stride_h == p.x.w * p.x.stride_w;
  const int64_t row_length = dense ? p.x.h * p.x.w : p.x.w;
  const Transform<T, T> run = transform_for<T, T>(affine.activation, wanted);
  run({x, p.x.stride_h, V * p.x.stride_w, p.x.stride_w, y, p.x.w, V, dense ? 1 : p.x.h, ceil_div(row_length, V),
       static_cast<int>((row_length - 1) % V + 1), 0},
      &scale, &sums);
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
  const int64_t per_vector = sizeof(Sums<C>) + sizeof(Scale<C>) + sizeof(Vec<C>);
  p.scratch_size = p.channels_last ? ceil_div(p.x.c, kLanes<C>) * per_vector : 0;
}

}  // namespace

namespace EFFK_ISA {

void map_pass_plan(MapPassParams& p) { p.dtype == Dtype::kFloat64 ? plan<double>(p) : plan<float>(p); }

void map_pass_run(const MapPassParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    for (int64_t i = first_unit; i < last_unit; ++i)
      p.channels_last ? run_channels_last<T>(p, i, scratch) : run_plane<T>(p, i);
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
