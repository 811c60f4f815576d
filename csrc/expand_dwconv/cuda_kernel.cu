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
    launch(plan, i.kernel_size == 3 ? select<T, 3>(i) : select<T, 5>(i), stream);
  });
}

}  // namespace effk::expand_dwconv
