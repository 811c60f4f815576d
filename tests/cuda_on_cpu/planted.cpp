// Kernels with mistakes, each of which this way of running them must find: `planted NAME` runs one.
#include <cstdio>
#include <string>
#include <vector>

#include "common/cuda_vec.cuh"

namespace effk {
__shared__ __align__(16) unsigned char dynamic_shared[cuda_on_cpu::kMaxShared];
}

using effk::Vec;

struct Params {
  const float* x;
  float* y;
  int n;
};

constexpr int kThreads = 96;

// y = x in reverse order within each block, one element per thread, through shared memory.
template <bool kBarrier, bool kDynamic>
__global__ void reverse(const Params p) {
  __shared__ float tile[kThreads];
  float* memory = kDynamic ? reinterpret_cast<float*>(effk::shared_memory()) : tile;
  const int first = blockIdx.x * blockDim.x;
  if (first + int(threadIdx.x) < p.n) memory[threadIdx.x] = p.x[first + threadIdx.x];
  if (kBarrier) __syncthreads();
  p.y[first + threadIdx.x] = memory[blockDim.x - 1 - threadIdx.x];
}

// y = x, four at a time from element `shift` on.
template <int kShift>
__global__ void copy_vectors(const Params p) {
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x) + kShift;
  if (i - kShift < p.n) Vec<float, 4>::load_global(p.x + i).store(p.y + i - kShift);
}

__global__ void dereference_float4(const Params p) {
  *reinterpret_cast<float4*>(p.y) = *reinterpret_cast<const float4*>(p.x + 1 + 4 * threadIdx.x);
}

__global__ void divergent_barrier(const Params p) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  p.y[threadIdx.x] = 0;
}

// The sum of each warp's elements, for all of its lanes, and how many are positive.
template <unsigned kMask>
__global__ void sum_warp(const Params p) {
  float sum = p.x[threadIdx.x];
  const unsigned votes = __ballot_sync(kMask, sum > 0);
  for (int span = 16; span > 0; span /= 2) sum += __shfl_xor_sync(kMask, sum, span);
  p.y[threadIdx.x] = sum + 1000 * __builtin_popcount(votes);
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  const int blocks = 3, n = blocks * kThreads;
  std::vector<float> x(n), y(n), expected(n);
  for (int i = 0; i < n; ++i) x[i] = expected[i] = float(i + 1);
  for (int b = 0; b < blocks; ++b) std::reverse(&expected[b * kThreads], &expected[b * kThreads] + kThreads);
  Params p{x.data(), y.data(), n};
  const auto run = [&](auto kernel, int grid, size_t shared = 0) {
    void* given[] = {&p};
    if (cudaLaunchKernel(kernel, grid, kThreads, given, shared, nullptr) != cudaSuccess) std::exit(3);
  };
  if (name == "nothing") run(reverse<true, false>, blocks);
  if (name == "nothing, dynamic") run(reverse<true, true>, blocks, kThreads * sizeof(float));
  if (name == "missing barrier") run(reverse<false, false>, blocks);
  if (name == "unwritten shared memory") {
    p.n -= 5;
    run(reverse<true, false>, blocks);
  }
  if (name == "beyond shared memory") run(reverse<true, true>, blocks, (kThreads - 2) * sizeof(float));
  if (name == "nothing, vectors") {
    expected = x;
    run(copy_vectors<0>, 1);
  }
  if (name == "beyond the end") {
    p.n += 4;
    run(copy_vectors<0>, 1);
  }
  if (name == "before the beginning") run(copy_vectors<-4>, 1);
  if (name == "misaligned vector") run(copy_vectors<1>, 1);
  if (name == "misaligned float4") run(dereference_float4, 1);
  if (name == "divergent barrier") run(divergent_barrier, 1);
  if (name == "nothing, shuffles") {
    x[40] = -x[40];
    run(sum_warp<0xffffffffu>, 1);
    for (int i = 0; i < kThreads; ++i) {
      expected[i] = 32000;
      for (int lane = 0; lane < 32; ++lane) expected[i] += x[i / 32 * 32 + lane];
      if (i / 32 == 1) expected[i] -= 1000;
    }
    std::copy(&expected[kThreads], &expected[0] + n, &y[kThreads]);
  }
  if (name == "lanes outside the mask") run(sum_warp<0xffffu>, 1);
  if (y != expected) {
    std::puts("wrong results");
    return 1;
  }
  std::puts("right results");
}
