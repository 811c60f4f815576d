// Copies from global to shared memory for which no thread waits, where the GPU has them.
#pragma once

#include "common/cuda_vec.cuh"

namespace effk {

// 16 bytes, aligned. They are there after `wait_for_copies`, for other threads after a barrier too.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = __ldg(static_cast<const uint4*>(global));
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace effk
