// Launches a pass over a map.
#include "common/execute.cuh"
#include "map_pass/kernel.cuh"

namespace effk::map_pass {

void execute(const Plan& plan, Stream stream) {
  with_type(plan.main.instance.dtype, [&](auto type) {
    using T = decltype(type);
    launch(plan, plan.main.instance.channels_last ? channels_last<T> : nchw<T>, stream);
  });
}

}  // namespace effk::map_pass
