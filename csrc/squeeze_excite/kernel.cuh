// Squeeze-excite's gate: two small matrix-vector products per image.
#pragma once

#include "common/cuda_vec.cuh"
#include "squeeze_excite/plan.h"

namespace effk::squeeze_excite {

// Rows [first, end) of activation(matrix x + bias), `lanes` threads to a row; `finish(row, value)` by one of them.
template <int V, class W, class Finish>
__device__ __forceinline__ void apply(const Layer& layer, const float* x, int first, int end, Finish finish) {
  const int lane = threadIdx.x % layer.lanes, team = threadIdx.x / layer.lanes, teams = kThreads / layer.lanes;
  const W* matrix = static_cast<const W*>(layer.matrix);
  // All threads go round equally often: shuffles need whole warps.
  for (int start = first; start < end; start += teams) {
    const int row = start + team;
    float sum = 0.0f;
    if (row < end) {
#pragma unroll 4
      for (int i = lane * V; i < layer.columns; i += layer.lanes * V) {
        const auto weights = Vec<W, V>::load_global(matrix + int64_t{row} * layer.columns + i);
#pragma unroll
        for (int v = 0; v < V; ++v) sum = fmaf(to_float(weights.at[v]), x[i + v], sum);
      }
    }
    for (int span = layer.lanes / 2; span > 0; span /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, span);
    if (lane == 0 && row < end) {
      const float bias = layer.bias ? to_float(load_global(static_cast<const W*>(layer.bias) + row)) : 0.0f;
      finish(row, activate(sum + bias, layer.activation));
    }
  }
}

template <class W, class Finish>
__device__ __forceinline__ void apply(const Layer& layer, const float* x, int first, int end, Finish finish) {
  if (layer.aligned) {
    apply<kVector<W>, W>(layer, x, first, end, finish);
  } else {
    apply<1, W>(layer, x, first, end, finish);
  }
}

template <class W>
__global__ void __launch_bounds__(kThreads, 2) gate(const GateParams p) {
  unsigned char* shared = shared_memory();
  float* hidden = reinterpret_cast<float*>(shared);  // [R]
  const int64_t image = int64_t{blockIdx.x / p.chunks} * p.expand.rows;
  apply<W>(p.reduce, p.pooled + image, 0, p.reduce.rows, [&](int row, float value) { hidden[row] = value; });
  __syncthreads();
  const int first = blockIdx.x % p.chunks * p.chunk;
  apply<W>(p.expand, hidden, first, min(first + p.chunk, p.expand.rows),
           [&](int row, float value) { p.gate[image + row] = value; });
}

}  // namespace effk::squeeze_excite
