// Squeeze-excite's gate: two small matrix-vector products per image.
#pragma once

#include "common/moments.cuh"
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
  const int c = p.expand.rows;
  const int64_t n = blockIdx.x / p.chunks, image = n * c;
  const float* pooled;
  if (p.pooled.partials) {
    float* merged = hidden + p.reduce.rows;  // [C]
    for (int i = threadIdx.x; i < c; i += kThreads) {
      const Moments* partials = p.pooled.partials + n * p.pooled.parts * c + i;
      Moments m{};
#pragma unroll 4
      for (int part = 0; part < p.pooled.parts; ++part) m = merge(m, partials[int64_t{part} * c]);
      merged[i] = m.origin + m.distance;
    }
    __syncthreads();
    pooled = merged;
  } else {
    pooled = p.pooled.mean + image;
  }
  apply<W>(p.reduce, pooled, 0, p.reduce.rows, [&](int row, float value) { hidden[row] = value; });
  __syncthreads();
  const int first = blockIdx.x % p.chunks * p.chunk;
  apply<W>(p.expand, hidden, first, min(first + p.chunk, c),
           [&](int row, float value) { p.gate[image + row] = value; });
}

}  // namespace effk::squeeze_excite
