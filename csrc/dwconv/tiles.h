// Which tile dwconv takes: the cheapest by a model of its time.
#pragma once

#include "common/tile_choice.h"
#include "dwconv/plan.h"

namespace effk::dwconv {

// Estimated cost of a launch in multiply-adds: those of its threads, idle ones too, and 2 for each byte staged (an L2
// of 64 bytes per cycle beside 128 multiply-adds). Too few warps on a multiprocessor expose latency, and a launch of
// too few warps leaves multiprocessors idle.
inline double cost(const Tile& t) {
  constexpr double kBlockOverhead = 20000, kWarpsPerSm = 16, kWarpsPerLaunch = 1024;
  constexpr int kSharedPerSm = 100 * 1024, kSharedReserved = 1024, kThreadsPerSm = 768;
  const double warps = double(ceil_div(t.threads, 32));
  const int resident = std::max(1, std::min(kSharedPerSm / (t.shared + kSharedReserved), kThreadsPerSm / t.threads));
  const double exposed = std::max(1.0, kWarpsPerSm / (resident * warps));
  const double block = kBlockOverhead + (2 * t.staged_bytes + warps * 32 * t.macs) * exposed;
  return std::max(double(t.blocks), kWarpsPerLaunch / warps) * block;
}

inline TileShape shape_of(const Tile& t) { return {t.group, t.strips, t.tile_w}; }

inline TileLimits limits_of(const Problem& q) {
  TileLimits limits{};
  limits.groups =
      q.channels_last ? channel_groups(q.x.c, q.dtype) : up_to(q.x.n * q.x.c, {1, 2, 4, 8, 16, 32, 64, 128});
  limits.strips = up_to(ceil_div(q.y.h, kRows), {1, 2, 4});
  limits.width = q.y.w;
  limits.lanes = q.channels_last ? lanes(q.kernel_size) : 1;
  limits.threads = kMaxThreads;
  limits.multiple = 1;
  limits.shared = kMaxShared;
  return limits;
}

inline auto tile_maker(const Problem& q) {
  return [&q](int group, int strips, int tile_w) {
    return (q.channels_last ? channels_last_tile : nchw_tile)(q, group, strips, tile_w);
  };
}

template <class F>
void for_each_tile(const Problem& q, F f) {
  for_each_within(limits_of(q), tile_maker(q), [&](const Tile& t) { f(t, cost(t)); });
}

inline std::string describe(const Problem& q) {
  return "dwconv " + type_of(q.dtype, false) + " " + sizes_of(q.x) + " " + layout_of(q.channels_last) + " to " +
         sizes_of(q.y) + ", " + window_of(q.kernel_size, q.stride) + ", " + reduction_of(q.reduce);
}

inline Tile accepted_tile(const Problem& q, const TileShape& shape) {
  return accepted_within(limits_of(q), describe(q), shape, tile_maker(q));
}

}  // namespace effk::dwconv
