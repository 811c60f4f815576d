// Launches the depthwise convolution's kernels.
#include "common/execute.cuh"
#include "dwconv/kernel.cuh"

namespace effk::dwconv {

using Kernel = void (*)(Params);

template <class T, int K>
static Kernel select(const Instance& i) {
  if (i.channels_last) return i.stride == 1 ? channels_last<T, K, 1> : channels_last<T, K, 2>;
  return i.stride == 1 ? nchw<T, K, 1> : nchw<T, K, 2>;
}

void execute(const Plan& plan, Stream stream) {
  const Instance& i = plan.main.instance;
  with_type(i.dtype, [&](auto type) {
    using T = decltype(type);
    launch(plan, i.kernel_size == 3 ? select<T, 3>(i) : i.kernel_size == 5 ? select<T, 5>(i) : select<T, 7>(i), stream);
  });
}

}  // namespace effk::dwconv
