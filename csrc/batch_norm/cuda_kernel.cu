// Launches BatchNorm's backward.
#include "batch_norm/kernel.cuh"
#include "common/execute.cuh"

namespace effk::batch_norm {

void execute(const Plan& plan, Stream stream) {
  with_type(plan.main.instance.dtype, [&](auto type) {
    using T = decltype(type);
    launch(plan, plan.main.instance.channels_last ? channels_last<T> : nchw<T>, stream);
  });
}

}  // namespace effk::batch_norm
