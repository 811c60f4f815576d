// Moments in registers and across a block.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/moments.h"

namespace effk {

// Chan's merge of two sets.
__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0.0f) return b;
  const float count = a.count + b.count, share = b.count / count;
  const float delta = (b.origin - a.origin) + (b.distance - a.distance);
  return {count, a.origin, fmaf(delta, share, a.distance), a.m2 + b.m2 + delta * delta * a.count * share};
}

// Sums of V values at a time, less `shift`: if that is the first one seen, nothing cancels where the mean is large.
template <int V>
struct ShiftedSums {
  float shift[V], sum[V], square[V];

  __device__ __forceinline__ ShiftedSums() {
#pragma unroll
    for (int v = 0; v < V; ++v) shift[v] = sum[v] = square[v] = 0.0f;
  }

  __device__ __forceinline__ void add(const float (&value)[V], bool shifts) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (shifts) shift[v] = value[v];
      const float d = value[v] - shift[v];
      sum[v] += d;
      square[v] = fmaf(d, d, square[v]);
    }
  }

  // Of `count` values each.
  __device__ __forceinline__ void moments(Moments (&m)[V], int count) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float mean = count ? sum[v] / count : 0.0f;
      m[v] = {static_cast<float>(count), shift[v], mean, fmaxf(square[v] - sum[v] * mean, 0.0f)};
    }
  }
};

// Merges the moments of the `members` threads of a group; member 0 gets the result. Value v of a member lies at
// shared[first + member * pitch + v]. Every thread of the block takes part, with the same number of members, after the
// block is done with that memory.
template <int V>
__device__ __forceinline__ void merge_block(Moments (&m)[V], Moments* shared, int first, int pitch, int member,
                                            int members) {
  constexpr int kFan = 8;
  while (members > 1) {
    const int left = (members + kFan - 1) / kFan;  // who go on; they leave alone what others still read
    if (member < members) {
#pragma unroll
      for (int v = 0; v < V; ++v) shared[first + member * pitch + v] = m[v];
    }
    __syncthreads();
    if (member < left) {
      for (int other = member + left; other < members; other += left)
#pragma unroll
        for (int v = 0; v < V; ++v) m[v] = merge(m[v], shared[first + other * pitch + v]);
    }
    members = left;
  }
}

// Leaves the moments of channels c to c + V - 1 over one part of a map.
template <int V>
__device__ __forceinline__ void store_moments(const Reduction& reduction, const Moments (&m)[V], int64_t n, int part,
                                              int parts, int c, int channels) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (c + v >= channels) break;
    if (reduction.partials) {
      reduction.partials[(n * parts + part) * channels + c + v] = m[v];
    } else {
      reduction.mean[n * channels + c + v] = m[v].origin + m[v].distance;
    }
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) merge_moments(const MergeParams p) {
  constexpr int kMembers = kThreads / kMergeColumns;
  unsigned char* shared_bytes = shared_memory();
  const int blocks = (p.c + kMergeColumns - 1) / kMergeColumns;
  const int64_t group = blockIdx.x / blocks;
  const int column = threadIdx.x % kMergeColumns, member = threadIdx.x / kMergeColumns;
  const int c = blockIdx.x % blocks * kMergeColumns + column;
  Moments m[1] = {{0.0f, 0.0f, 0.0f, 0.0f}};
  if (c < p.c) {
    const Moments* partials = p.partials + group * p.parts * p.c + c;
#pragma unroll 4
    for (int part = member; part < p.parts; part += kMembers) m[0] = merge(m[0], partials[int64_t{part} * p.c]);
  }
  merge_block<1>(m, reinterpret_cast<Moments*>(shared_bytes), column, kMergeColumns, member, kMembers);
  if (member == 0 && c < p.c) {
    p.sums[group * p.c + c] = m[0].origin + m[0].distance;
    if (p.has_var) p.sums[(p.groups + group) * p.c + c] = m[0].m2 / m[0].count;
  }
}

}  // namespace effk
