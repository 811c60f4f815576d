// The CUDA launches of the depthwise convolution's backward: which kernel, how the map is cut into tiles, what the
// kernel is told.
//
// Rows and columns of the input are counted from the padding's first, in steps of the stride: step u has the input
// columns S * u to S * u + S - 1, and of the output the columns u - reach to u see them, reach = (K - 1) / S.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "common/partial_sums.h"
#include "common/transform.h"
#include "expand_dwconv/expand.h"

namespace effk::dwconv_backward {

// Steps of a thread, in a column: 7 divides the maps of 224-pixel inputs. With stride 2 a step is four pixels.
constexpr int steps(int stride) { return stride == 1 ? 7 : 4; }
// Channels of a thread in channels_last: of each it keeps k * k weights and as many sums in registers.
constexpr int lanes(int kernel_size) { return kernel_size == 3 ? 2 : 1; }
// In NCHW, the widest load of a thread: beside the sums of 49 taps there are registers for no more.
constexpr int load_bytes(int kernel_size) { return kernel_size == 7 ? kVectorBytes / 2 : kVectorBytes; }
// Sums that a block adds up at a time.
constexpr int kSumsAtOnce = 6;

constexpr int kMaxThreads = 256;
// How many blocks of so many threads the registers of a multiprocessor are to hold.
constexpr int blocks_per_sm(int kernel_size, bool channels_last) {
  return kernel_size < 7 && channels_last ? 2 : 1;
}
constexpr int kMaxShared = 48 * 1024;  // what every GPU grants without an opt-in

struct Instance {
  bool channels_last, expands;  // expands only in channels_last
  Dtype dtype;
  int kernel_size, stride;
};

inline std::string kernel_name(const Instance& i) {
  return "effk::dwconv_backward::kernel<" + cuda_name(i.dtype) + ", " + std::to_string(i.kernel_size) + ", " +
         std::to_string(i.stride) + ", " + (i.channels_last ? "true" : "false") + ", " +
         (i.expands ? "true" : "false") + ">";
}

struct Problem {
  Map grad, y, x, grad_norm;  // grad_norm.data may be null
  Dtype dtype;
  const void* weight;  // [C, 1, k, k], contiguous
  int kernel_size, stride, pad_top, pad_left;
  BackwardTransform after;
  Transform before;
  bool need_weight;
  bool channels_last;  // the layout of x
  // If it `expands`, x is not in memory but a product: of expand [hidden, C], contiguous, and narrow [N, C, H, W].
  bool expands = false;
  Map narrow;
  const void* expand;
  int max_shared = kMaxShared;
};

struct Params {
  const void *grad, *y, *x, *weight;
  void* grad_norm;  // null: not needed
  Strides grad_stride, y_stride, x_stride, grad_norm_stride;
  BackwardTransform after;
  Transform before;
  PartialSums sums;  // of the weight's gradient [C, k, k], and of dz and dz * xhat [2, C]
  int c, h, w, out_h, out_w, pad_top, pad_left;
  int tiles_h, tiles_w, tiles;  // of a map, and of all
  int tiles_each;               // of a block, one after the other
  int strips, tile_w;           // a tile: strips * steps by tile_w steps
  int group, groups;            // channels of a block
  int grad_vector;              // elements of an aligned load of grad and y: along columns, or all lanes or 1
  bool x_vector, grad_norm_vector;  // channels_last: lanes are one access
  int pitch, plane_pitch;           // NCHW: floats between rows and planes of the staged tile
  int weight_pitch;                 // floats between the taps' weights
  int before_offset, weight_offset, tile_offset;  // bytes of shared memory before them
  // Of an instance that expands: what it multiplies, and floats between the pixels of e, which come last.
  Operands operands;
  int e_pitch, narrow_offset, expand_offset, e_offset;
};

using Plan = SummingPlan<Instance, Params>;

struct Tile {
  int group, strips, tile_w;
  int threads;
  int64_t shared;
  int pitch, plane_pitch, weight_pitch, before_offset, weight_offset, tile_offset;
  int e_pitch, narrow_offset, expand_offset, e_offset;
  int64_t groups, tiles_h, tiles_w, tiles;
};

constexpr int reach(int kernel_size, int stride) { return (kernel_size - 1) / stride; }

// How many steps the input takes, along a side.
inline int64_t steps_of(int64_t size, int pad, int stride) { return (pad + size - 1) / stride - pad / stride + 1; }

// Shared memory: per channel a ChannelBackward and a Normalize, the weights [k * k, group], then dy under the tile, all
// in float: [rows, columns, group] in channels_last, [group, rows, pitch] in NCHW. Neighbouring threads read neighbouring
// floats; those of a warp run along columns, then planes in NCHW, whose pitch keeps their banks apart. An expansion has
// its operands behind that, the tile's pixels and a group's weights, then e [rows, columns, group] in float, pixels an
// odd multiple of 8 channels apart.
inline Tile make_tile(const Problem& q, const Operands& operands, int group, int strips, int tile_w) {
  const int k = q.kernel_size, vector = kVectorBytes / size_of(q.dtype);
  const int rows = strips * steps(q.stride) + reach(k, q.stride), columns = tile_w + reach(k, q.stride);
  Tile t{};
  t.group = group;
  t.strips = strips;
  t.tile_w = tile_w;
  t.threads = group / (q.channels_last ? lanes(k) : 1) * tile_w * strips;
  // A row starts up to vector - 1 columns early, so that its loads are aligned.
  t.pitch = int(round_up(columns + vector - 1, vector));
  t.plane_pitch = rows * t.pitch;
  if (group > 1) t.plane_pitch += int(round_up((32 + tile_w - t.plane_pitch % 32) % 32, 4));
  t.weight_pitch = int(round_up(group, 2));
  t.before_offset = group * 32;
  t.weight_offset = int(round_up(t.before_offset + group * sizeof(Normalize), 16));
  t.tile_offset = int(round_up(t.weight_offset + k * k * t.weight_pitch * sizeof(float), 16));
  const int floats = q.channels_last ? int(round_up(rows * columns * group, 4)) : group * t.plane_pitch;
  const int sums = kSumsAtOnce * tile_w * strips * (group | 1);
  t.shared = t.tile_offset + std::max(floats, sums) * int(sizeof(float));
  if (q.expands) {
    const int64_t pixels = std::min<int64_t>(strips * steps(q.stride) * q.stride, q.x.h) *
                           std::min<int64_t>(tile_w * q.stride, q.x.w);
    const auto place = [&](int64_t bytes) {
      const int64_t begin = round_up(t.shared, 16);
      t.shared = begin + bytes;
      return int(begin);
    };
    t.e_pitch = group + 8;
    t.narrow_offset = place(operand_bytes(operands, q.dtype, round_up(pixels, kUnitPixels)));
    t.expand_offset = place(operand_bytes(operands, q.dtype, group));
    t.e_offset = place(pixels * t.e_pitch * int64_t{sizeof(float)});
  }
  t.groups = ceil_div(q.x.c, group);
  t.tiles_h = ceil_div(steps_of(q.x.h, q.pad_top, q.stride), strips * steps(q.stride));
  t.tiles_w = ceil_div(steps_of(q.x.w, q.pad_left, q.stride), tile_w);
  t.tiles = q.x.n * t.tiles_h * t.tiles_w;
  return t;
}

// A problem must not be empty.
inline Plan make_plan(const Problem& q, const Tile& t) {
  // Blocks enough for a large GPU, of which each does the work of ten pixels or more for each sum that it leaves.
  constexpr int64_t kBlocks = 1024, kPixelsPerSum = 10;
  const int k = q.kernel_size;
  const int64_t pixels = int64_t{t.strips} * steps(q.stride) * t.tile_w * q.stride * q.stride;
  const int64_t least = std::min(ceil_div(kPixelsPerSum * (k * k + 2), pixels), t.tiles);
  const int64_t tiles_each = std::max(ceil_div(t.tiles * t.groups, kBlocks), least);
  const int64_t parts = ceil_div(t.tiles, tiles_each);
  Plan plan;
  plan.main.instance = {q.channels_last, q.expands, q.dtype, k, q.stride};
  plan.main.grid = unsigned(to_int32(parts * t.groups, "the number of blocks"));
  plan.main.block = unsigned(t.threads);
  plan.main.shared_bytes = unsigned(t.shared);
  Params& p = plan.main.params = Params{};
  p.grad = q.grad.data;
  p.y = q.y.data;
  p.x = q.x.data;
  p.weight = q.weight;
  p.grad_norm = const_cast<void*>(q.grad_norm.data);
  p.grad_stride = strides_of(q.grad);
  p.y_stride = strides_of(q.y);
  p.x_stride = strides_of(q.x);
  p.grad_norm_stride = strides_of(q.grad_norm);
  p.after = q.after;
  p.before = q.before;
  p.c = to_int32(q.x.c, "the number of channels");
  p.h = to_int32(q.x.h, "the height");
  p.w = to_int32(q.x.w, "the width");
  p.out_h = to_int32(q.y.h, "the output height");
  p.out_w = to_int32(q.y.w, "the output width");
  p.pad_top = q.pad_top;
  p.pad_left = q.pad_left;
  p.tiles_h = int(t.tiles_h);
  p.tiles_w = int(t.tiles_w);
  p.tiles = to_int32(t.tiles, "the number of tiles");
  p.tiles_each = int(tiles_each);
  p.strips = t.strips;
  p.tile_w = t.tile_w;
  p.group = t.group;
  p.groups = int(t.groups);
  p.pitch = t.pitch;
  p.plane_pitch = t.plane_pitch;
  p.weight_pitch = t.weight_pitch;
  p.before_offset = t.before_offset;
  p.weight_offset = t.weight_offset;
  p.tile_offset = t.tile_offset;
  const auto all_lanes = [&](const Map& map) { return vectorizes(map, q.dtype, true, lanes(k)); };
  if (q.channels_last) {
    p.grad_vector = all_lanes(q.grad) && all_lanes(q.y) ? lanes(k) : 1;
    p.x_vector = all_lanes(q.x);
    p.grad_norm_vector = all_lanes(q.grad_norm);
  } else {
    p.grad_vector = std::min({widest_vector(q.grad, q.dtype, false), widest_vector(q.y, q.dtype, false),
                              load_bytes(k) / size_of(q.dtype)});
  }
  if (q.expands) {
    p.operands = make_operands(q.narrow, q.dtype, q.expand);
    p.e_pitch = t.e_pitch;
    p.narrow_offset = t.narrow_offset;
    p.expand_offset = t.expand_offset;
    p.e_offset = t.e_offset;
  }
  const bool need_sums = q.grad_norm.data && q.before.mean;
  plan.sum(int(parts), q.need_weight ? q.x.c * k * k : 0, need_sums ? 2 * q.x.c : 0);
  return plan;
}

void execute(const Plan& plan, Stream stream);            // cuda_kernel.cu
void execute_expanding(const Plan& plan, Stream stream);  // ../expand_dwconv_backward/cuda_kernel.cu

}  // namespace effk::dwconv_backward
