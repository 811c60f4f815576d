// From a launch plan to the GPU. For cuda_kernel.cu files, which know nothing of torch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/cuda_vec.cuh"
#include "common/moments.cuh"
#include "common/partial_sums.cuh"

namespace effk {

// Calls f with a value of the storage type.
template <class F>
auto with_type(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  if (dtype == Dtype::kFloat16) return f(__half{});
  return f(__nv_bfloat16{});
}

template <class Instance, class Params>
void launch(const Launch<Instance, Params>& plan, void (*kernel)(Params), cudaStream_t stream) {
  constexpr unsigned kGranted = 48 * 1024;  // of shared memory; more must be asked for
  Params params = plan.params;
  void* arguments[] = {&params};
  cudaError_t error = cudaSuccess;
  if (plan.shared_bytes > kGranted)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes));
  // Not <<<>>>: tests compile this with an ordinary compiler too.
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel, plan.grid, plan.block, arguments, plan.shared_bytes, stream);
  if (error != cudaSuccess)
    throw std::runtime_error("launching " + kernel_name(plan.instance) + ": " + cudaGetErrorString(error));
}

template <class Instance, class Params>
void launch(const ReducingPlan<Instance, Params>& plan, void (*kernel)(Params), cudaStream_t stream) {
  launch(plan.main, kernel, stream);
  if (plan.merge) launch(*plan.merge, merge_moments<kMergeThreads>, stream);
}

template <class Instance, class Params>
void launch(const SummingPlan<Instance, Params>& plan, void (*kernel)(Params), cudaStream_t stream) {
  launch(plan.main, kernel, stream);
  if (plan.add) launch(*plan.add, add_parts<kAddThreads>, stream);
}

}  // namespace effk
