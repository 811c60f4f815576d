// Which tile the depthwise convolution's backward takes: the cheapest by a model of its time.
#pragma once

#include "common/tile_choice.h"
#include "dwconv_backward/plan.h"

namespace effk::dwconv_backward {

// Estimated cost of a launch in instructions of a thread: kStaged for each element of dy, halo included, and for each
// pixel kPixel and two multiply-adds per tap, of idle threads too; 2 for each byte read or written (an L2 of 64 bytes per
// cycle beside 128 multiply-adds). Too few warps on a multiprocessor expose latency. An expansion reads the narrow map
// instead of x, and multiplies.
inline double cost(const Problem& q, const Tile& t) {
  constexpr double kOverhead = 20000, kStaged = 40, kPixel = 40, kWarpsPerSm = 16;
  constexpr int kSharedPerSm = 100 * 1024, kSharedReserved = 1024;
  const int k = q.kernel_size, threads_per_sm = kMaxThreads * blocks_per_sm(k, q.channels_last);
  const int over = reach(k, q.stride), area = q.stride * q.stride;
  const double staged = double(std::min<int64_t>(t.strips * steps(q.stride) + over, q.y.h)) *
                        std::min<int64_t>(t.tile_w + over, q.y.w);
  const double pixels = double(t.strips) * steps(q.stride) * t.tile_w * area;
  const double warps = double(ceil_div(t.threads, 32));
  const int64_t fitting = std::min<int64_t>(kSharedPerSm / (t.shared + kSharedReserved), threads_per_sm / t.threads);
  const double exposed = std::max(1.0, kWarpsPerSm / (std::max<int64_t>(fitting, 1) * warps));
  const double pixel_bytes = q.channels_last ? round_up(t.group * size_of(q.dtype), 64) : t.group * size_of(q.dtype);
  double bytes = 2 * (staged + pixels) * pixel_bytes, product = 0;
  if (q.expands) {
    bytes += pixels * (q.narrow.c * size_of(q.dtype) - pixel_bytes);
    product = std::ceil(pixels / kUnitPixels) * (t.group / kUnitChannels) * 128 *
              product_cycles(q.dtype, q.narrow.c, false, 12);
  }
  const double thread = steps(q.stride) * area * (2 * k * k + kPixel) * (q.channels_last ? lanes(k) : 1);
  const double tile = kOverhead + (2 * bytes + kStaged * staged * t.group + product + warps * 32 * thread) * exposed;
  return double(t.groups * t.tiles) * tile;
}

inline TileShape shape_of(const Tile& t) { return {t.group, t.strips, t.tile_w}; }

inline TileLimits limits_of(const Problem& q) {
  TileLimits limits{};
  if (q.expands)
    limits.groups = up_to(round_up(q.x.c, kUnitChannels), {16, 32, 48, 64});
  else
    limits.groups = q.channels_last ? channel_groups(q.x.c, q.dtype) : up_to(q.x.c, {1, 2, 4, 8, 16, 32, 64});
  limits.strips = up_to(ceil_div(steps_of(q.x.h, q.pad_top, q.stride), steps(q.stride)), {1, 2, 3, 4, 5, 6, 7, 8});
  limits.width = steps_of(q.x.w, q.pad_left, q.stride);
  limits.lanes = q.channels_last ? lanes(q.kernel_size) : 1;
  limits.threads = kMaxThreads;
  limits.multiple = q.expands ? 32 : 1;  // whole warps multiply
  limits.shared = q.max_shared;
  return limits;
}

inline auto tile_maker(const Problem& q) {
  return [&q, operands = q.expands ? make_operands(q.narrow, q.dtype, q.expand) : Operands{}](int group, int strips,
                                                                                             int tile_w) {
    return make_tile(q, operands, group, strips, tile_w);
  };
}

template <class F>
void for_each_tile(const Problem& q, F f) {
  for_each_within(limits_of(q), tile_maker(q), [&](const Tile& t) { f(t, cost(q, t)); });
}

inline std::string describe(const Problem& q) {
  const std::string op = q.expands ? "expand_dwconv_backward " : "dwconv_backward ";
  const std::string expands =
      q.expands ? ", from " + sizes_of(q.narrow) + " in " + std::to_string(q.max_shared) + " bytes" : "";
  return op + type_of(q.dtype, false) + " " + sizes_of(q.y) + " " + layout_of(q.channels_last) + " to " +
         sizes_of(q.x) + ", " + window_of(q.kernel_size, q.stride) + expands;
}

inline Tile accepted_tile(const Problem& q, const TileShape& shape) {
  return accepted_within(limits_of(q), describe(q), shape, tile_maker(q));
}

}  // namespace effk::dwconv_backward
