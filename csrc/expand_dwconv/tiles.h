// Which tile expand_dwconv takes: the cheapest by a model of its time.
#pragma once

#include "common/tile_choice.h"
#include "expand_dwconv/plan.h"

namespace effk::expand_dwconv {

// Estimated cycles of a multiprocessor, whose busiest units are counted.
constexpr double kBytesPerCycle = 32, kDramBytesPerCycle = 10, kLaunch = 3000, kBlockOverhead = 1500;

// To activate as many values: 16 special functions a cycle, two for each.
constexpr double kActivationCycles = 2.0 * kUnitPixels * kUnitChannels / 16;

// For a warp's share of the depthwise convolution.
inline double depthwise_cycles(const Problem& q) {
  const int k = q.kernel_size, per_thread = lanes(k);
  return kRows * (per_thread * (k * k + 12) + q.stride * k * (per_thread + 1)) / 4.0;
}

inline double cost(const Problem& q, const Tile& t) {
  const double product = product_cycles(q.dtype, q.x.c, q.tf32, 12);
  constexpr double kGroupOverhead = 600, kWarps = kThreads / 32;
  const double per_sm = std::max(double(t.blocks) / q.gpu.multiprocessors, 1.0);
  // Of two blocks one computes while the other waits.
  const double fitting = 2 * (t.shared + 1024) <= q.gpu.shared_per_multiprocessor ? blocks_per_sm(q.kernel_size) : 1;
  const double resident = std::min(per_sm, fitting);
  const double units = double(ceil_div(t.pixels, kUnitPixels)) * (t.group / kUnitChannels);
  const double rounds = std::ceil(units / kWarps) * kWarps;
  // Few warps do not keep the units busy.
  const double warps = std::ceil(t.group / lanes(q.kernel_size) * t.tile_w * t.strips / 32.0);
  const double loads = (double(t.pixels) + double(t.group) * t.groups_each) * double(q.x.c) * size_of(q.dtype);
  const double group = kGroupOverhead / resident + rounds * (product + kActivationCycles) +
                       std::max(warps, kWarps / resident) * depthwise_cycles(q);
  return kLaunch + per_sm * (kBlockOverhead / resident + loads / kBytesPerCycle + t.groups_each * group);
}

// Of the expansion and the depthwise convolution in a launch each, with the expanded map in memory between them. They
// are taken to reach two thirds of what their units can.
inline double staged_cost(const Problem& q) {
  const double e = double(q.x.n) * q.x.h * q.x.w * q.d.c, d = double(q.d.n) * q.d.h * q.d.w * q.d.c;
  const double product = product_cycles(q.dtype, q.x.c, q.tf32, 8);
  const double expand = e / (kUnitPixels * kUnitChannels) * (product + kActivationCycles);
  const double depthwise = d / (32 * kRows * lanes(q.kernel_size)) * depthwise_cycles(q);
  const double memory = 2 * e * size_of(q.dtype) / kDramBytesPerCycle;
  return 2 * (kLaunch + kBlockOverhead) + 1.5 * (expand + depthwise + memory) / q.gpu.multiprocessors;
}

// Whether an expansion belongs inside the kernel, rather than in a launch of its own.
inline bool worthwhile(const Problem& q, const Tile& t) { return cost(q, t) < staged_cost(q); }

inline TileShape shape_of(const Tile& t) { return {t.group, t.strips, t.tile_w}; }

inline TileLimits limits_of(const Problem& q) {
  TileLimits limits{};
  limits.groups = up_to(round_up(q.d.c, kUnitChannels), {16, 32, 48, 64});
  limits.strips = up_to(ceil_div(q.d.h, kRows), {1, 2, 3, 4});
  limits.width = q.d.w;
  limits.lanes = lanes(q.kernel_size);
  limits.threads = kThreads;
  limits.multiple = 1;
  limits.shared = q.gpu.shared_per_block;
  return limits;
}

inline auto tile_maker(const Problem& q) {
  return [&q, operands = make_operands(q.x, q.dtype, q.expand)](int group, int strips, int tile_w) {
    return make_tile(q, operands, group, strips, tile_w);
  };
}

template <class F>
void for_each_tile(const Problem& q, F f) {
  for_each_within(limits_of(q), tile_maker(q), [&](const Tile& t) { f(t, cost(q, t)); });
}

inline std::string describe(const Problem& q) {
  return "expand_dwconv " + type_of(q.dtype, q.tf32) + " " + sizes_of(q.x) + " " + layout_of(q.x.stride_c == 1) +
         " to " + sizes_of(q.d) + ", " + window_of(q.kernel_size, q.stride) + ", " + reduction_of(q.reduce) + ", " +
         std::to_string(q.gpu.multiprocessors) + " multiprocessors of " +
         std::to_string(q.gpu.shared_per_block) + " bytes";
}

inline Tile accepted_tile(const Problem& q, const TileShape& shape) {
  return accepted_within(limits_of(q), describe(q), shape, tile_maker(q));
}

}  // namespace effk::expand_dwconv
