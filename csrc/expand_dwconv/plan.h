// The CUDA launch that expands and convolves depthwise: d = act2(bn2(dwconv(act1(bn1(expand x))))), and sums d up.
#pragma once

#include <algorithm>
#include <optional>

#include "common/moments.h"
#include "common/transform.h"
#include "dwconv/plan.h"
#include "expand_dwconv/expand.h"

namespace effk::expand_dwconv {

using dwconv::kRows;
using dwconv::lanes;
using dwconv::window;

constexpr int kThreads = 256;
// How many of them the registers of a multiprocessor are to hold.
constexpr int blocks_per_sm(int kernel_size) { return kernel_size < 7 ? 2 : 1; }

struct Instance {
  Dtype dtype;
  int kernel_size, stride;
};

inline std::string kernel_name(const Instance& i) {
  return "effk::expand_dwconv::kernel<" + cuda_name(i.dtype) + ", " + std::to_string(i.kernel_size) + ", " +
         std::to_string(i.stride) + ">";
}

// What a plan has to know of the GPU; here the least that there is since sm_80.
struct Gpu {
  int multiprocessors = 108;
  int shared_per_block = kLeastShared, shared_per_multiprocessor = 100 * 1024;
};

struct Problem {
  Map x, d;  // d is dense, in channels_last
  Dtype dtype;
  bool tf32;  // whether float32 is multiplied in it
  const void *expand, *depthwise;  // [hidden, C], [hidden, 1, k, k], contiguous
  int kernel_size, stride, pad_top, pad_left;
  Transform norm1, norm2;
  Reduce reduce;
  Gpu gpu;
};

struct Params {
  Operands operands;
  const void* depthwise;
  void* d;
  Strides d_stride;
  Transform norm1, norm2;
  Reduction reduction;
  int h, w, hidden, out_h, out_w, pad_top, pad_left;
  int tiles_h, tiles_w;      // of a map
  int strips, tile_w;        // output tile: strips * kRows by tile_w
  int group;                 // channels that are expanded at a time
  int groups, groups_each;   // of the hidden channels; of a block
  int e_pitch;               // elements between pixels of e
  int weight_pitch;          // floats between the taps' weights
  // Bytes of shared memory before these; x comes first.
  int expand_offset, e_offset, norm_offset, weight_offset, sum_offset;
  bool d_vector, tf32;
};

using Plan = ReducingPlan<Instance, Params>;

// A norm as scale * z + shift, of a sum z in float32: as exact as subtracting the mean from it.
struct Folded {
  float scale, shift;
};

struct Tile {
  int group, strips, tile_w, groups_each;
  int e_pitch, weight_pitch;
  int expand_offset, e_offset, norm_offset, weight_offset, sum_offset;
  int64_t pixels, shared, blocks;
};

// Shared memory: x, the pixels of the map under the tile, [pixels, C]; the expand weights of a group, [group, C]; the
// expanded tile with its zeros around the map, [rows, columns, group]; the group's norms, depthwise weights and sums.
// Pixels of e lie an odd multiple of 8 channels apart.
inline Tile make_tile(const Problem& q, const Operands& operands, int group, int strips, int tile_w) {
  const int k = q.kernel_size, size = size_of(q.dtype);
  const int64_t rows = window(strips * kRows, k, q.stride), columns = window(tile_w, k, q.stride);
  Tile t{};
  t.group = group;
  t.strips = strips;
  t.tile_w = tile_w;
  t.e_pitch = group + 8;
  t.weight_pitch = group + 4;
  t.pixels = std::min(rows, q.x.h) * std::min(columns, q.x.w);
  const auto place = [&](int64_t bytes) {
    const int64_t begin = t.shared;
    t.shared += round_up(bytes, 16);
    return int(begin);
  };
  place(operand_bytes(operands, q.dtype, round_up(t.pixels, kUnitPixels)));
  t.expand_offset = place(operand_bytes(operands, q.dtype, group));
  t.e_offset = place(rows * columns * t.e_pitch * size);
  t.norm_offset = place(2 * group * int64_t{sizeof(Folded)});
  t.weight_offset = place(k * k * t.weight_pitch * int64_t{sizeof(float)});
  const int64_t sum = q.reduce == Reduce::kNone ? 0 : q.reduce == Reduce::kMean ? sizeof(float) : sizeof(Moments);
  t.sum_offset = place(strips * tile_w * group * sum);
  // Where tiles are few, several blocks share one.
  const int64_t tiles = q.x.n * ceil_div(q.d.h, strips * kRows) * ceil_div(q.d.w, tile_w);
  const int64_t groups = ceil_div(q.d.c, group);
  const int64_t shares = std::min(ceil_div(2 * q.gpu.multiprocessors, tiles), groups);
  t.groups_each = int(ceil_div(groups, shares));
  t.blocks = tiles * ceil_div(groups, t.groups_each);
  return t;
}

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

// The cheapest tile; none where nothing fits shared memory.
inline std::optional<Tile> best_tile(const Problem& q) {
  constexpr int kGroups[] = {16, 32, 48, 64};
  constexpr int kWidths = 4, kMaxStrips = 4;
  const Operands operands = make_operands(q.x, q.dtype, q.expand);
  std::optional<Tile> best;
  double best_cost = 0;
  for (int group : kGroups) {
    if (group > round_up(q.d.c, kUnitChannels)) break;
    for (int strips = 1; strips <= std::min<int64_t>(kMaxStrips, ceil_div(q.d.h, kRows)); ++strips) {
      const int widest = kThreads / (group / lanes(q.kernel_size) * strips);
      if (widest == 0) break;
      int considered = 0;
      for (int64_t cuts = ceil_div(q.d.w, widest); considered < kWidths && cuts <= q.d.w; ++cuts) {
        const Tile t = make_tile(q, operands, group, strips, int(ceil_div(q.d.w, cuts)));
        if (t.shared > q.gpu.shared_per_block) continue;
        ++considered;
        const double c = cost(q, t);
        if (best && c >= best_cost) continue;
        best = t;
        best_cost = c;
      }
    }
  }
  return best;
}

// A problem must not be empty.
inline Plan make_plan(const Problem& q, const Tile& t) {
  Plan plan;
  plan.main.instance = {q.dtype, q.kernel_size, q.stride};
  plan.main.grid = unsigned(to_int32(t.blocks, "the number of blocks"));
  plan.main.block = kThreads;
  plan.main.shared_bytes = unsigned(t.shared);
  Params& p = plan.main.params = Params{};
  p.operands = make_operands(q.x, q.dtype, q.expand);
  p.depthwise = q.depthwise;
  p.d = const_cast<void*>(q.d.data);
  p.d_stride = strides_of(q.d);
  p.norm1 = q.norm1;
  p.norm2 = q.norm2;
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
  p.e_pitch = t.e_pitch;
  p.weight_pitch = t.weight_pitch;
  p.expand_offset = t.expand_offset;
  p.e_offset = t.e_offset;
  p.norm_offset = t.norm_offset;
  p.weight_offset = t.weight_offset;
  p.sum_offset = t.sum_offset;
  p.d_vector = vectorizes(q.d, q.dtype, true, lanes(q.kernel_size));
  p.tf32 = q.tf32;
  plan.reduce(q.reduce, to_int32(q.x.n, "the batch"), p.tiles_h * p.tiles_w, p.hidden);
  return plan;
}

// cuda_kernel.cu
void execute(const Plan& plan, Stream stream);
Gpu current_gpu();

}  // namespace effk::expand_dwconv
