// The CUDA launch of squeeze-excite's gate. Its other phases, the mean and the scaling, are passes over a map.
#pragma once

#include <algorithm>

#include "common/activation.h"
#include "common/moments.h"

namespace effk::squeeze_excite {

constexpr int kThreads = 512;
constexpr int kMaxShared = 48 * 1024;

struct GateInstance {
  Dtype dtype;  // of the weights
};

inline std::string kernel_name(const GateInstance& i) {
  return "effk::squeeze_excite::gate<" + cuda_name(i.dtype) + ">";
}

// A dense matrix [rows, columns] and a vector [rows] to add to its products, or null.
struct Layer {
  const void *matrix, *bias;
  int rows, columns;
  ActivationForm activation;
  int lanes;     // threads that share a row: a power of 2 up to 32
  bool aligned;  // whether rows are whole 16-byte vectors
};

inline Layer make_layer(const void* matrix, const void* bias, int rows, int columns, int activation, Dtype dtype) {
  const int vector = kVectorBytes / size_of(dtype);
  const bool aligned = columns % vector == 0 && reinterpret_cast<uintptr_t>(matrix) % kVectorBytes == 0;
  int lanes = 1;
  while (lanes < 32 && lanes < columns / (aligned ? vector : 1)) lanes *= 2;
  return {matrix, bias, rows, columns, activation_form(activation), lanes, aligned};
}

struct GateParams {
  Means pooled;
  float* gate;  // [N, C]
  Layer reduce, expand;
  int chunks, chunk;  // blocks per image, and the channels of each
};

using GateLaunch = Launch<GateInstance, GateParams>;

// One block, or a few, per image: each computes all hidden units, then its share of the channels. In shared memory it
// keeps the hidden units, and the means of all channels where they come in parts.
inline GateLaunch plan_gate(const Means& pooled, float* gate, const Layer& reduce, const Layer& expand, int64_t n,
                            Dtype dtype) {
  constexpr int kEnoughBlocks = 128, kMinChunk = 128;
  const int64_t shared = (reduce.rows + (pooled.partials ? int64_t{reduce.columns} : 0)) * int64_t{sizeof(float)};
  if (shared > kMaxShared)
    throw std::invalid_argument("the hidden units of squeeze-excite must fit " + std::to_string(kMaxShared) +
                                " bytes of shared memory, got " + std::to_string(shared));
  const int64_t wanted = std::clamp<int64_t>(kEnoughBlocks / n, 1, ceil_div(expand.rows, kMinChunk));
  const int chunk = int(ceil_div(expand.rows, wanted)), chunks = int(ceil_div(expand.rows, chunk));
  return {{dtype},
          unsigned(to_int32(n * chunks, "the number of blocks")),
          kThreads,
          unsigned(shared),
          {pooled, gate, reduce, expand, chunks, chunk}};
}

void execute(const GateLaunch& plan, Stream stream);  // cuda_kernel.cu

}  // namespace effk::squeeze_excite
