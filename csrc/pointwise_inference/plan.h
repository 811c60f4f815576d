// The CUDA launch of a 1x1 convolution in inference: y = act(bn(weight (x * gate))) + residual.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/transform.h"

namespace effk::pointwise_inference {

constexpr int kThreads = 256;
constexpr int kWarpsDown = 4, kWarpsAcross = 2;

// The depth of the product comes in chunks of kChunkBytes a row, double-buffered in shared memory in rows of kRowBytes.
constexpr int kChunkBytes = 64, kRowBytes = kChunkBytes + 16;

// Pixels of one image by output channels: 16 and 8 of them are a matrix instruction's.
struct Tile {
  int pixels, channels;
};

// The finished product in floats; its rows lie 8 banks apart.
constexpr int product_pitch(int channels) { return channels + 8; }

constexpr int shared_bytes(const Tile& t) {
  return std::max(2 * (t.pixels + t.channels) * kRowBytes, t.pixels * product_pitch(t.channels) * int(sizeof(float)));
}

// Wide maps have few channels; small maps, many.
constexpr Tile kTiles[] = {{128, 32}, {128, 64}, {64, 128}};

struct Instance {
  Dtype dtype;
  Tile tile;
};

inline std::string kernel_name(const Instance& i) {
  return "effk::pointwise_inference::kernel<" + cuda_name(i.dtype) + ", " + std::to_string(i.tile.pixels) + ", " +
         std::to_string(i.tile.channels) + ">";
}

struct Problem {
  Map x, y, residual;  // residual.data may be null
  Dtype dtype;
  bool tf32;           // whether float32 is multiplied in it
  const void* weight;  // [O, C], contiguous
  const float* gate;   // [N, C] or null
  Transform epilogue;
};

struct Params {
  const void *x, *weight, *residual;
  const float* gate;
  void* y;
  Strides x_stride, y_stride, residual_stride;
  Transform epilogue;
  int c, out_c, w, pixels;  // pixels of an image
  int tiles, channel_tiles;
  // Whether 16 bytes along channels are one aligned access: of x and gate, of weight, of y and residual.
  bool x_aligned, weight_aligned, y_aligned;
  bool tf32;
};

using Plan = Launch<Instance, Params>;

// A problem must not be empty.
inline Plan make_plan(const Problem& q, const Tile& t) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; };
  const int vector = kVectorBytes / size_of(q.dtype);
  Plan plan{};
  Params& p = plan.params;
  p.x = q.x.data;
  p.weight = q.weight;
  p.residual = q.residual.data;
  p.gate = q.gate;
  p.y = const_cast<void*>(q.y.data);
  p.x_stride = strides_of(q.x);
  p.y_stride = strides_of(q.y);
  if (p.residual) p.residual_stride = strides_of(q.residual);
  p.epilogue = q.epilogue;
  p.c = to_int32(q.x.c, "the number of channels");
  p.out_c = to_int32(q.y.c, "the number of output channels");
  p.w = to_int32(q.x.w, "the width");
  p.pixels = to_int32(q.x.h * q.x.w, "the size of a map");
  p.tiles = int(ceil_div(p.pixels, t.pixels));
  p.channel_tiles = int(ceil_div(p.out_c, t.channels));
  p.x_aligned = vectorizes(q.x, q.dtype, true, vector) && aligned(q.gate);
  p.weight_aligned = p.c % vector == 0 && aligned(q.weight);
  p.y_aligned = vectorizes(q.y, q.dtype, true, vector) &&
                (!p.residual || vectorizes(q.residual, q.dtype, true, vector));
  p.tf32 = q.tf32;
  const int64_t blocks = q.x.n * p.tiles * p.channel_tiles;
  plan.instance = {q.dtype, t};
  plan.grid = unsigned(to_int32(blocks, "the number of blocks"));
  plan.block = kThreads;
  plan.shared_bytes = unsigned(shared_bytes(t));
  return plan;
}

void execute(const Plan& plan, Stream stream);  // cuda_kernel.cu

}  // namespace effk::pointwise_inference
