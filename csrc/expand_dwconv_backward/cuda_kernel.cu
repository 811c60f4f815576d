// Launches the backward of the depthwise convolution of an expansion. Apart, to be compiled beside the others.
#include "common/execute.cuh"
#include "dwconv_backward/kernel.cuh"

namespace effk::dwconv_backward {

template <class T, int K>
static auto select_expanding(const Instance& i) {
  return i.stride == 1 ? kernel<T, K, 1, true, true> : kernel<T, K, 2, true, true>;
}

void execute_expanding(const Plan& plan, Stream stream) {
  const Instance& i = plan.main.instance;
  with_type(i.dtype, [&](auto type) {
    using T = decltype(type);
    const int k = i.kernel_size;
    const auto select = k == 3 ? select_expanding<T, 3> : k == 5 ? select_expanding<T, 5> : select_expanding<T, 7>;
    launch(plan, select(i), stream);
  });
}

}  // namespace effk::dwconv_backward
