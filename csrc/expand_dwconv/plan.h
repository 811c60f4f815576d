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
