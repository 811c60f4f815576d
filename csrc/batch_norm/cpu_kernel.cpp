#include "cpu_kernel.h"

#include "common/tile.h"

namespace effk {
namespace {

constexpr int64_t kTileBytes = 24 << 10;  // of each map: what the first-level cache keeps
constexpr int64_t kMaxPixels = 64;
constexpr int64_t kBandElements = 64 << 10;

// A tile of all channels of one image. `sums` [sums_count][padded] are added to; `out` is like x.
template <class C>
using TilePass = void (*)(const NormPassParams& p, int64_t n, Tile<C> x, Tile<C> other, int64_t pixels, C* sums,
                          C* out);

template <class C, int A, NormPassParams::Kind K>
void pass_tile(const NormPassParams& p, int64_t n, Tile<C> x, Tile<C> other, int64_t pixels, C* sums, C* out) {
  constexpr int V = kLanes<C>;
  for (int64_t c = 0; c < p.x.c; c += V) {
    const int lanes = static_cast<int>(min64(p.x.c - c, V));
    const Vec<C> scale = lanes_of<C>(p.norm.scale, c, lanes, 1), shift = lanes_of<C>(p.norm.shift, c, lanes, 0);
    const Vec<C> mean = lanes_of<C>(p.norm.mean, c, lanes, 0);
    const Vec<C> of_mean = lanes_of<C>(p.norm.slope, c, lanes, 0), constant = lanes_of<C>(p.norm.constant, c, lanes, 0);
    const Vec<C> factor = lanes_of<C>(p.factor, n * p.x.c + c, lanes, 1);
    const Vec<C> added = lanes_of<C>(p.added, n * p.x.c + c, lanes, 0);
    Vec<C> sum[3] = {};
    for (int64_t i = 0; i < pixels; ++i) {
      const Vec<C> value = x.at(i, c), z = value * scale + shift;
      if constexpr (K == NormPassParams::kResidual) {
        Vec<C> y = z * factor;
        if (other.data) y += other.at(i, c);
        store(out + i * p.padded + c, y);
      } else if constexpr (K == NormPassParams::kPoolOnly) {
        sum[0] += activate<A>(z);
      } else {
        Vec<C> h, slope;
        activate_with_slope<A>(z, h, slope);
        if constexpr (K == NormPassParams::kPool) {
          sum[0] += h;
          sum[1] += slope;
          sum[2] += slope * (value - mean);
        } else {
          const Vec<C> dz = (other.at(i, c) * factor + added) * slope;
          if constexpr (K == NormPassParams::kBackward) {
            store(out + i * p.padded + c, dz * scale + (value - mean) * of_mean + constant);
          } else {
            sum[0] += dz;
            sum[1] += dz * (value - mean);
          }
        }
      }
    }
    for (int64_t i = 0; i < p.sums_count; ++i) store(sums + i * p.padded + c, load(sums + i * p.padded + c) + sum[i]);
  }
}

template <class C>
TilePass<C> pass_for(NormPassParams::Kind kind, int32_t activation) {
  TilePass<C> chosen = nullptr;
  with_activation(activation, [&](auto act) {
    chosen = kind == NormPassParams::kPool           ? &pass_tile<C, act, NormPassParams::kPool>
             : kind == NormPassParams::kPoolOnly     ? &pass_tile<C, act, NormPassParams::kPoolOnly>
             : kind == NormPassParams::kBackwardSums ? &pass_tile<C, act, NormPassParams::kBackwardSums>
             : kind == NormPassParams::kBackward     ? &pass_tile<C, act, NormPassParams::kBackward>
                                                     : &pass_tile<C, kIdentity, NormPassParams::kResidual>;
  });
  return chosen;
}

template <class T>
void run(const NormPassParams& p, int64_t unit, void* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  C* buffers[3];
  for (int i = 0; i < 3; ++i) buffers[i] = static_cast<C*>(scratch) + i * p.tile_pixels * p.padded;
  const int64_t n = unit / p.bands, begin = unit % p.bands * p.band_pixels;
  const int64_t end = min64(begin + p.band_pixels, p.x.h * p.x.w);
  C* sums = static_cast<C*>(p.sums) + unit * p.sums_count * p.padded;
  for (int64_t i = 0; i < p.sums_count * p.padded; i += V) store(sums + i, Vec<C>{});
  const TilePass<C> pass = pass_for<C>(p.kind, p.norm.activation);
  for (int64_t first = begin; first < end; first += p.tile_pixels) {
    const int64_t pixels = min64(p.tile_pixels, end - first);
    const Tile<C> x = load_tile<T>(p.x, n, first, pixels, 0, p.x.c, buffers[0]);
    Tile<C> other{};
    if (p.other.data) other = load_tile<T>(p.other, n, first, pixels, 0, p.x.c, buffers[1]);
    pass(p, n, x, other, pixels, sums, buffers[2]);
    if (p.y.data) store_tile<T>(p.y, n, first, pixels, 0, p.x.c, buffers[2], p.padded);
  }
}

template <class C>
void plan(NormPassParams& p) {
  const int64_t map = p.x.h * p.x.w;
  p.padded = round_up<C>(p.x.c);
  // Whole vectors of pixels, which NCHW transposes; and few enough for a plain sum to be exact.
  const int64_t fitting = max64(kTileBytes / static_cast<int64_t>(sizeof(C)) / p.padded / kLanes<C>, 1) * kLanes<C>;
  p.tile_pixels = min64(min64(fitting, kMaxPixels), map);
  const int64_t tiles = max64(kBandElements / (p.tile_pixels * p.padded), 1);
  p.band_pixels = tiles * p.tile_pixels;
  p.bands = ceil_div(map, p.band_pixels);
  p.units = p.x.n * p.bands;
  constexpr int64_t kSums[] = {3, 1, 2, 0, 0};
  p.sums_count = kSums[p.kind];
  p.scratch_size = 3 * p.tile_pixels * p.padded * sizeof(C);
}

}  // namespace

namespace EFFK_ISA {

void norm_pass_plan(NormPassParams& p) { p.dtype == Dtype::kFloat64 ? plan<double>(p) : plan<float>(p); }

void norm_pass_run(const NormPassParams& p, int64_t first, int64_t last, void* scratch) {
  with_storage(p.dtype, [&](auto storage) {
    for (int64_t i = first; i < last; ++i) run<decltype(storage)>(p, i, scratch);
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
