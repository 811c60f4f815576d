// The 1x1 expansion of a map inside a kernel that reads what it makes: the product's operands, and what it costs.
#pragma once

#include <cmath>

#include "common/launch.h"

namespace effk {

// Bytes of shared memory that a block can have on every GPU since sm_80.
constexpr int kLeastShared = 99 * 1024;
// Of a product of a warp: pixels by channels.
constexpr int kUnitPixels = 32, kUnitChannels = 16;

struct Operands {
  const void *x, *expand;  // [N, C, H, W], [hidden, C]
  Strides x_stride;
  int c;
  int depth, pitch;  // of the product, C and zeros; elements between rows of its operands in shared memory
  bool x_aligned, expand_aligned;
};

// Operands lie an odd multiple of 16 bytes apart.
inline Operands make_operands(const Map& x, Dtype dtype, const void* expand) {
  const int size = size_of(dtype), vector = kVectorBytes / size;
  Operands e{};
  e.x = x.data;
  e.expand = expand;
  e.x_stride = strides_of(x);
  e.c = to_int32(x.c, "the number of channels");
  e.depth = int(round_up(x.c, 2 * vector));
  e.pitch = e.depth + vector;
  e.x_aligned = vectorizes(x, dtype, true, vector);
  e.expand_aligned = x.c % vector == 0 && reinterpret_cast<uintptr_t>(expand) % kVectorBytes == 0;
  return e;
}

// Bytes of shared memory for so many rows of an operand.
inline int64_t operand_bytes(const Operands& e, Dtype dtype, int64_t rows) { return rows * e.pitch * size_of(dtype); }

// Estimated cycles of a multiprocessor for a product of kUnitPixels by kUnitChannels: shared memory feeds matrix
// instructions, so many `steps` for each 32 bytes of depth; 128 lanes multiply float32.
inline double product_cycles(Dtype dtype, int64_t c, bool tf32, double steps) {
  if (dtype == Dtype::kFloat32 && !tf32) return 4.0 * c;
  return steps * std::ceil(c * size_of(dtype) / 32.0);
}

}  // namespace effk
