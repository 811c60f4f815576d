// Sums across a block and across its launch.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/partial_sums.h"

namespace effk {

// Adds up kSums sums of V channels over the `members` threads of each channel, in a fixed order, kAtOnce of them at a
// time in `shared`, [kAtOnce, members, group | 1] floats: leave(sum, channel, total) for each. Every thread of the block
// takes part, after the block is done with that memory.
template <int kAtOnce, int V, int kSums, class Leave>
__device__ __forceinline__ void add_members(const float (&sums)[kSums][V], float* shared, int lane, int group,
                                            int member, int members, Leave leave) {
  const int pitch = group | 1;
#pragma unroll
  for (int first = 0; first < kSums; first += kAtOnce) {
    const int count = min(int{kAtOnce}, kSums - first);
    if (first > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= kSums) break;
#pragma unroll
      for (int v = 0; v < V; ++v) shared[(i * members + member) * pitch + lane + v] = sums[first + i][v];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * group; i += blockDim.x) {
      const int sum = i / group, channel = i - sum * group;
      float total = 0.0f;
#pragma unroll 4
      for (int other = 0; other < members; ++other) total += shared[(sum * members + other) * pitch + channel];
      leave(first + sum, channel, total);
    }
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) add_parts(const AddPartsParams p) {
  constexpr int kMembers = kThreads / kAddColumns;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int column = threadIdx.x % kAddColumns, member = threadIdx.x / kAddColumns;
  const int64_t at = int64_t{blockIdx.x} * kAddColumns + column;
  float sum = 0;
  if (at < p.columns) {
#pragma unroll 8
    for (int part = member; part < p.count; part += kMembers) sum += load_global(p.parts + part * p.columns + at);
  }
  shared[threadIdx.x] = sum;
  for (int left = kMembers / 2; left > 0; left /= 2) {
    __syncthreads();
    if (member < left) shared[threadIdx.x] += shared[threadIdx.x + left * kAddColumns];
  }
  if (member == 0 && at < p.columns) (at < p.split ? p.first + at : p.second + (at - p.split))[0] = shared[column];
}

}  // namespace effk
