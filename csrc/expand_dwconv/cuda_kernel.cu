// Launches the kernels that expand and convolve depthwise.
#include "common/execute.cuh"
#include "expand_dwconv/kernel.cuh"

namespace effk::expand_dwconv {

template <class T, int K>
static auto select(const Instance& i) {
  return i.stride == 1 ? kernel<T, K, 1> : kernel<T, K, 2>;
}

void execute(const Plan& plan, Stream stream) {
  const Instance& i = plan.main.instance;
  with_type(i.dtype, [&](auto type) {
    using T = decltype(type);
    launch(plan, i.kernel_size == 3 ? select<T, 3>(i) : i.kernel_size == 5 ? select<T, 5>(i) : select<T, 7>(i), stream);
  });
}

Gpu current_gpu() {
  int device = 0;
  Gpu gpu;
  const auto read = [&](cudaDeviceAttr attribute, int& value) {
    if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
      throw std::runtime_error("the GPU does not tell its attributes");
  };
  if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("there is no current GPU");
  read(cudaDevAttrMultiProcessorCount, gpu.multiprocessors);
  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu.shared_per_block);
  read(cudaDevAttrMaxSharedMemoryPerMultiprocessor, gpu.shared_per_multiprocessor);
  return gpu;
}

}  // namespace effk::expand_dwconv
