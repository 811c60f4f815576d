// Launches the kernels of the 1x1 convolution in inference.
#include "common/execute.cuh"
#include "pointwise_inference/kernel.cuh"

namespace effk::pointwise_inference {

void execute(const Plan& plan, Stream stream) {
  with_type(plan.instance.dtype, [&](auto type) {
    using T = decltype(type);
    switch (plan.instance.tile.channels) {
      case 32:
        return launch(plan, kernel<T, 128, 32>, stream);
      case 64:
        return launch(plan, kernel<T, 128, 64>, stream);
      default:
        return launch(plan, kernel<T, 64, 128>, stream);
    }
  });
}

}  // namespace effk::pointwise_inference
