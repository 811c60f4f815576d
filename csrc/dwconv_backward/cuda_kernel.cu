// Launches the backward of the depthwise convolution.
#include "common/execute.cuh"
#include "dwconv_backward/kernel.cuh"

namespace effk::dwconv_backward {

template <class T, int K, int S>
static auto select(const Instance& i) {
  return i.channels_last ? kernel<T, K, S, true, false> : kernel<T, K, S, false, false>;
}

template <class T, int K>
static auto select(const Instance& i) {
  return i.stride == 1 ? select<T, K, 1>(i) : select<T, K, 2>(i);
}

void execute(const Plan& plan, Stream stream) {
  const Instance& i = plan.main.instance;
  with_type(i.dtype, [&](auto type) {
    using T = decltype(type);
    launch(plan, i.kernel_size == 3 ? select<T, 3>(i) : i.kernel_size == 5 ? select<T, 5>(i) : select<T, 7>(i), stream);
  });
}

}  // namespace effk::dwconv_backward
