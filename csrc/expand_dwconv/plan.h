// The CUDA launch that expands and convolves depthwise: d = act2(bn2(dwconv(act1(bn1(expand x))))), and d's mean.
#pragma once

#include <algorithm>
#include <optional>

#include "common/moments.h"
#include "common/transform.h"
#include "dwconv/plan.h"

namespace effk::expand_dwconv {

using dwconv::kRows;
using dwconv::lanes;
using dwconv::window;

constexpr int kMaxThreads = 256, kMaxShared = 48 * 1024;
// Of a product of a warp: pixels by channels.
constexpr int kUnitPixels = 32, kUnitChannels = 16;

struct Instance {
  Dtype dtype;
  int kernel_size, stride;  // 3 or 5; 1 or 2
};

inline std::string kernel_name(const Instance& i) {
  return "effk::expand_dwconv::kernel<" + cuda_name(i.dtype) + ", " + std::to_string(i.kernel_size) + ", " +
         std::to_string(i.stride) + ">";
}

struct Problem {
  Map x, d;  // d is dense, in channels_last
  Dtype dtype;
  const void *expand, *depthwise;  // [hidden, C], [hidden, 1, k, k], contiguous
  int kernel_size, stride, pad_top, pad_left;
  Transform norm1, norm2;
  Reduce reduce;  // none, or the mean
};

struct Params {
  const void *x, *expand, *depthwise;
  void* d;
  Strides x_stride, d_stride;
  Transform norm1, norm2;
  Reduction reduction;
  int c, h, w, hidden, out_h, out_w, pad_top, pad_left;
  int tiles_h, tiles_w;      // of a map
  int strips, tile_w;        // output tile: strips * kRows by tile_w
  int group;                 // channels that are expanded at a time
  int groups, groups_each;   // of the hidden channels; of a block
  int depth, pitch, e_pitch; // of the product; elements between rows of its operands, and between pixels of e
  int weight_pitch;          // floats between the taps' weights
  // Bytes of shared memory before these; x comes first.
  int expand_offset, e_offset, norm_offset, weight_offset, sum_offset;
  bool x_aligned, expand_aligned, d_vector;
};

using Plan = ReducingPlan<Instance, Params>;

struct Tile {
  int group, strips, tile_w, groups_each;
  int threads, pitch, e_pitch, weight_pitch;
  int expand_offset, e_offset, norm_offset, weight_offset, sum_offset, shared;
  int64_t blocks;
};

// Shared memory: x, the pixels of the map under the tile, [pixels, C]; the expand weights of a group, [group, C]; the
// expanded tile with its zeros around the map, [rows, columns, group]; the group's norms, depthwise weights and sums.
// Operands lie an odd multiple of 16 bytes apart, pixels of e an odd multiple of 8 channels.
inline Tile make_tile(const Problem& q, int group, int strips, int tile_w, int groups_each) {
  const int k = q.kernel_size, size = size_of(q.dtype), per_thread = lanes(k);
  const int64_t rows = window(strips * kRows, k, q.stride), columns = window(tile_w, k, q.stride);
  const int64_t pixels = round_up(std::min(rows, q.x.h) * std::min(columns, q.x.w), kUnitPixels);
  const int64_t pitch_bytes = round_up(q.x.c * size, 32) + 16;
  Tile t{};
  t.group = group;
  t.strips = strips;
  t.tile_w = tile_w;
  t.groups_each = groups_each;
  t.threads = int(round_up(group / per_thread * tile_w, 32));
  t.pitch = int(pitch_bytes / size);
  t.e_pitch = group + 8;
  t.weight_pitch = group + 4;
  auto place = [end = int64_t{0}](int64_t bytes) mutable {
    const int64_t begin = end;
    end += round_up(bytes, 16);
    return int(std::min<int64_t>(begin, kMaxShared + 1));
  };
  place(pixels * pitch_bytes);
  t.expand_offset = place(group * pitch_bytes);
  t.e_offset = place(rows * columns * t.e_pitch * size);
  t.norm_offset = place(2 * group * int64_t{sizeof(Normalize)});
  t.weight_offset = place(k * k * t.weight_pitch * int64_t{sizeof(float)});
  t.sum_offset = place(q.reduce == Reduce::kNone ? 0 : tile_w * group * int64_t{sizeof(float)});
  t.shared = place(0);
  const int64_t groups = ceil_div(q.d.c, group);
  t.blocks = q.x.n * ceil_div(q.d.h, strips * kRows) * ceil_div(q.d.w, tile_w) * ceil_div(groups, groups_each);
  return t;
}

// Estimated cost of a launch in cycles of a multiprocessor: what a block takes of the units that are busiest. A launch
// of few blocks leaves multiprocessors idle.
inline double cost(const Problem& q, const Tile& t) {
  constexpr double kEnoughBlocks = 216, kBlockOverhead = 1500, kGroupOverhead = 400, kBytesPerCycle = 32;
  constexpr double kUnitActivation = 64;  // two special functions for each of 512 values
  const int k = q.kernel_size, size = size_of(q.dtype), per_thread = lanes(k);
  const double rows = std::min<double>(window(t.strips * kRows, k, q.stride), double(q.x.h));
  const double columns = std::min<double>(window(t.tile_w, k, q.stride), double(q.x.w));
  const double units = std::ceil(rows * columns / kUnitPixels) * (t.group / kUnitChannels);
  const double unit_product = q.dtype == Dtype::kFloat32 ? 4.0 * q.x.c : 12.0 * std::ceil(q.x.c / 16.0);
  const double row_instructions = per_thread * (k * k + 12.0) + q.stride * k * (1 + per_thread);
  const double depthwise = t.threads / 32.0 * t.strips * kRows * row_instructions / 4;
  const double idle_warps = std::max(1.0, 4.0 / (t.threads / 32.0));
  const double group = kGroupOverhead + units * (unit_product + kUnitActivation) + depthwise * idle_warps;
  const double loads = (rows * columns + double(t.group) * t.groups_each) * q.x.c * size / kBytesPerCycle;
  return std::max(double(t.blocks), kEnoughBlocks) * (kBlockOverhead + loads + t.groups_each * group);
}

// The cheapest tile; none where a tile of x does not fit, or there is no kernel.
inline std::optional<Tile> best_tile(const Problem& q) {
  constexpr int kGroups[] = {16, 32, 48, 64};
  constexpr int kWidest = 32, kWidths = 4, kMaxStrips = 4;
  if (q.kernel_size > 5) return std::nullopt;
  std::optional<Tile> best;
  double best_cost = 0;
  for (int group : kGroups) {
    if (group > round_up(q.d.c, kUnitChannels)) break;
    const int groups = int(ceil_div(q.d.c, group));
    for (int strips = 1; strips <= std::min<int64_t>(kMaxStrips, ceil_div(q.d.h, kRows)); ++strips) {
      int considered = 0;
      for (int64_t cuts = ceil_div(q.d.w, kWidest); considered < kWidths && cuts <= q.d.w; ++cuts) {
        const int tile_w = int(ceil_div(q.d.w, cuts));
        bool fits = false;
        for (int groups_each = groups; groups_each >= 1; groups_each = groups_each == 1 ? 0 : (groups_each + 1) / 2) {
          const Tile t = make_tile(q, group, strips, tile_w, groups_each);
          if (t.threads > kMaxThreads || t.shared > kMaxShared) break;
          fits = true;
          const double c = cost(q, t);
          if (best && c >= best_cost) continue;
          best = t;
          best_cost = c;
        }
        considered += fits;
      }
    }
  }
  return best;
}

// A problem must not be empty.
inline std::optional<Plan> make_plan(const Problem& q) {
  const std::optional<Tile> tile = best_tile(q);
  if (!tile) return std::nullopt;
  const Tile& t = *tile;
  const int vector = kVectorBytes / size_of(q.dtype);
  Plan plan;
  plan.main.instance = {q.dtype, q.kernel_size, q.stride};
  plan.main.grid = unsigned(to_int32(t.blocks, "the number of blocks"));
  plan.main.block = unsigned(t.threads);
  plan.main.shared_bytes = unsigned(t.shared);
  Params& p = plan.main.params = Params{};
  p.x = q.x.data;
  p.expand = q.expand;
  p.depthwise = q.depthwise;
  p.d = const_cast<void*>(q.d.data);
  p.x_stride = strides_of(q.x);
  p.d_stride = strides_of(q.d);
  p.norm1 = q.norm1;
  p.norm2 = q.norm2;
  p.c = to_int32(q.x.c, "the number of channels");
  p.h = to_int32(q.x.h, "the height");
  p.w = to_int32(q.x.w, "the width");
  p.hidden = to_int32(q.d.c, "the number of hidden channels");
  p.out_h = to_int32(q.d.h, "the output height");
  p.out_w = to_int32(q.d.w, "the output width");
  p.pad_top = q.pad_top;
  p.pad_left = q.pad_left;
  p.tiles_h = int(ceil_div(q.d.h, t.strips * kRows));
  p.tiles_w = int(ceil_div(q.d.w, t.tile_w));
  p.strips = t.strips;
  p.tile_w = t.tile_w;
  p.group = t.group;
  p.groups = int(ceil_div(q.d.c, t.group));
  p.groups_each = t.groups_each;
  p.depth = t.pitch - vector;
  p.pitch = t.pitch;
  p.e_pitch = t.e_pitch;
  p.weight_pitch = t.weight_pitch;
  p.expand_offset = t.expand_offset;
  p.e_offset = t.e_offset;
  p.norm_offset = t.norm_offset;
  p.weight_offset = t.weight_offset;
  p.sum_offset = t.sum_offset;
  p.x_aligned = vectorizes(q.x, q.dtype, true, vector);
  p.expand_aligned = p.c % vector == 0 && reinterpret_cast<uintptr_t>(q.expand) % kVectorBytes == 0;
  p.d_vector = vectorizes(q.d, q.dtype, true, lanes(q.kernel_size));
  plan.reduce(q.reduce, to_int32(q.x.n, "the batch"), p.tiles_h * p.tiles_w, p.hidden);
  return plan;
}

void execute(const Plan& plan, Stream stream);  // cuda_kernel.cu

}  // namespace effk::expand_dwconv
