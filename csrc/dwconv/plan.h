// The depthwise convolution's CUDA launch: which kernel, how the map is cut into tiles, what the kernel is told.
#pragma once

#include <algorithm>

#include "common/layout.h"
#include "common/moments.h"
#include "common/transform.h"

namespace effk::dwconv {

// Output rows of a thread, in a column: 7 divides the maps of 224-pixel inputs. Its window of input rows moves down
// through registers, so a row is read from shared memory once per thread, and weights once per block.
constexpr int kRows = 7;
// Channels of a thread in channels_last: its k * k weights for each stay in registers.
constexpr int lanes(int kernel_size) { return kernel_size == 3 ? 4 : 2; }

constexpr int kMaxThreads = 256;
constexpr int kMaxShared = 48 * 1024;  // what every GPU grants without an opt-in

struct Instance {
  bool channels_last;
  Dtype dtype;
  int kernel_size, stride;
};

inline std::string kernel_name(const Instance& i) {
  return std::string("effk::dwconv::") + (i.channels_last ? "channels_last<" : "nchw<") + cuda_name(i.dtype) + ", " +
         std::to_string(i.kernel_size) + ", " + std::to_string(i.stride) + ">";
}

struct Problem {
  Map x, y;
  Dtype dtype;
  const void* weight;  // [C, 1, k, k], contiguous
  int kernel_size, stride, pad_top, pad_left;
  Transform prologue, epilogue;
  Reduce reduce;
  bool channels_last;  // the layout of y
};

// What an NCHW block knows of each of its planes.
struct PlaneInfo {
  int64_t x, y;  // offsets
  Normalize prologue, epilogue;
};

struct Params {
  const void *x, *weight;
  void* y;
  Strides x_stride, y_stride;
  Transform prologue, epilogue;
  Reduction reduction;
  int n, c, h, w, out_h, out_w, pad_top, pad_left;
  int tiles_h, tiles_w;  // of a map
  int strips, tile_w;    // output tile: strips * kRows by tile_w
  int group;             // channels (channels_last) or planes (NCHW) of a block
  int x_vector;          // elements of an aligned load: along channels, 1 or kVector; along columns, a power of 2
  bool y_vector;         // channels_last: whole vectors are stored
  int pitch;             // NCHW: floats between rows of the staged tile
  int plane_pitch;       // NCHW: floats between its planes
  int weight_pitch;      // channels_last: floats between the taps' weights
  int weight_offset;     // bytes of shared memory before the weights
  int tile_offset;       // NCHW: before the staged tile
};

using Plan = ReducingPlan<Instance, Params>;

// Input rows or columns under `outputs` neighbouring outputs.
constexpr int window(int outputs, int kernel_size, int stride) { return (outputs - 1) * stride + kernel_size; }

struct Tile {
  int group, strips, tile_w;
  int threads, shared;
  int pitch, plane_pitch, weight_pitch, weight_offset, tile_offset;
  int64_t blocks;
  double staged_bytes, macs;  // of a block; of a thread
};

// Shared memory of channels_last: the staged input [rows, columns, group] in the storage type, then the weights
// [k * k, group] in float. Reads are then consecutive; the weights' pitch keeps their transposing stores apart.
inline Tile channels_last_tile(const Problem& q, int group, int strips, int tile_w) {
  const int k = q.kernel_size, size = size_of(q.dtype), per_thread = lanes(k);
  const int pixels = window(strips * kRows, k, q.stride) * window(tile_w, k, q.stride);
  Tile t{};
  t.group = group;
  t.strips = strips;
  t.tile_w = tile_w;
  t.threads = group / per_thread * tile_w * strips;
  t.weight_pitch = group + (32 + per_thread - group % 32) % 32;
  t.weight_offset = int(round_up(pixels * group * size, 16));
  t.shared = t.weight_offset + k * k * t.weight_pitch * int(sizeof(float));
  if (q.reduce != Reduce::kNone) t.shared = std::max(t.shared, t.threads * per_thread * int(sizeof(Moments)));
  t.blocks = q.x.n * ceil_div(q.x.c, group) * ceil_div(q.y.h, strips * kRows) * ceil_div(q.y.w, tile_w);
  t.staged_bytes = double(pixels) * round_up(group * size, 64);
  t.macs = per_thread * kRows * k * k;
  return t;
}

// Shared memory of NCHW: a PlaneInfo per plane, the weights [group, k * k] and the staged input [group, rows, pitch],
// in float. Threads of a warp run along columns, then planes: the planes' pitch keeps their banks apart.
inline Tile nchw_tile(const Problem& q, int group, int strips, int tile_w) {
  const int k = q.kernel_size, size = size_of(q.dtype), vector = kVectorBytes / size;
  const int rows = window(strips * kRows, k, q.stride), columns = window(tile_w, k, q.stride);
  Tile t{};
  t.group = group;
  t.strips = strips;
  t.tile_w = tile_w;
  t.threads = tile_w * strips * group;
  // A row starts up to vector - 1 columns early, so that its loads are aligned.
  t.pitch = int(round_up(columns + vector - 1, vector));
  t.plane_pitch = rows * t.pitch;
  if (group > 1) t.plane_pitch += int(round_up((32 + tile_w - t.plane_pitch % 32) % 32, 4));
  t.weight_offset = group * int(sizeof(PlaneInfo));
  t.tile_offset = int(round_up(t.weight_offset + group * k * k * int(sizeof(float)), 16));
  t.shared = t.tile_offset + group * t.plane_pitch * int(sizeof(float));
  if (q.reduce != Reduce::kNone) t.shared = std::max(t.shared, t.threads * int(sizeof(Moments)));
  t.blocks = ceil_div(q.x.n * q.x.c, group) * ceil_div(q.y.h, strips * kRows) * ceil_div(q.y.w, tile_w);
  t.staged_bytes = double(group) * rows * round_up(columns * size, 64);
  t.macs = kRows * k * k;
  return t;
}

// A problem must not be empty.
inline Plan make_plan(const Problem& q, const Tile& t) {
  Plan plan;
  plan.main.instance = {q.channels_last, q.dtype, q.kernel_size, q.stride};
  plan.main.grid = unsigned(to_int32(t.blocks, "the number of blocks"));
  plan.main.block = unsigned(t.threads);
  plan.main.shared_bytes = unsigned(t.shared);
  Params& p = plan.main.params = Params{};
  p.x = q.x.data;
  p.weight = q.weight;
  p.y = const_cast<void*>(q.y.data);
  p.x_stride = strides_of(q.x);
  p.y_stride = strides_of(q.y);
  p.prologue = q.prologue;
  p.epilogue = q.epilogue;
  to_int32(q.x.n * q.x.c, "batch times channels");
  p.n = to_int32(q.x.n, "the batch");
  p.c = to_int32(q.x.c, "the number of channels");
  p.h = to_int32(q.x.h, "the height");
  p.w = to_int32(q.x.w, "the width");
  p.out_h = to_int32(q.y.h, "the output height");
  p.out_w = to_int32(q.y.w, "the output width");
  p.pad_top = q.pad_top;
  p.pad_left = q.pad_left;
  p.tiles_h = int(ceil_div(q.y.h, t.strips * kRows));
  p.tiles_w = int(ceil_div(q.y.w, t.tile_w));
  p.strips = t.strips;
  p.tile_w = t.tile_w;
  p.group = t.group;
  p.pitch = t.pitch;
  p.plane_pitch = t.plane_pitch;
  p.weight_pitch = t.weight_pitch;
  p.weight_offset = t.weight_offset;
  p.tile_offset = t.tile_offset;
  p.x_vector = widest_vector(q.x, q.dtype, q.channels_last);
  p.y_vector = vectorizes(q.y, q.dtype, q.channels_last, lanes(q.kernel_size));
  plan.reduce(q.reduce, p.n, p.tiles_h * p.tiles_w, p.c);
  return plan;
}

void execute(const Plan& plan, Stream stream);  // cuda_kernel.cu

}  // namespace effk::dwconv
