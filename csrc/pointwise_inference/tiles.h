// Which tile pointwise_inference takes: the cheapest by a model of its time.
#pragma once

#include "common/tile_choice.h"
#include "pointwise_inference/plan.h"

namespace effk::pointwise_inference {

// Estimated cost of a launch in bytes brought to multiprocessors. A launch of few blocks leaves some idle.
inline double cost(const Problem& q, const Tile& t) {
  constexpr double kEnoughBlocks = 216, kBlockOverhead = 16384;
  const double flops_per_byte = q.dtype != Dtype::kFloat32 ? 64 : q.tf32 ? 32 : 8;
  const double blocks = double(q.x.n * ceil_div(q.x.h * q.x.w, t.pixels) * ceil_div(q.y.c, t.channels));
  const double loads = double(t.pixels + t.channels) * q.x.c * size_of(q.dtype);
  const double flops = 2.0 * t.pixels * t.channels * q.x.c;
  return std::max(blocks, kEnoughBlocks) * (kBlockOverhead + std::max(loads, flops / flops_per_byte));
}

inline TileShape shape_of(const Tile& t) { return {t.pixels, t.channels}; }

template <class F>
void for_each_tile(const Problem& q, F f) {
  for (const Tile& t : kTiles) f(t, cost(q, t));
}

inline std::string describe(const Problem& q) {
  return "pointwise_inference " + type_of(q.dtype, q.tf32) + " " + sizes_of(q.x) + " " +
         layout_of(q.x.stride_c == 1) + " to " + sizes_of(q.y) + (q.gate ? ", gated" : "") +
         (q.residual.data ? ", with a residual" : "");
}

inline Tile accepted_tile(const Problem& q, const TileShape& shape) {
  std::string accepted;
  for (const Tile& t : kTiles) {
    if (shape_of(t) == shape) return t;
    accepted += (accepted.empty() ? "" : ", ") + std::to_string(t.pixels) + " x " + std::to_string(t.channels);
  }
  throw std::invalid_argument(describe(q) + ": tile must have pixels x channels in " + accepted + "; got " +
                              std::to_string(shape[0]) + " x " + std::to_string(shape[1]));
}

}  // namespace effk::pointwise_inference
