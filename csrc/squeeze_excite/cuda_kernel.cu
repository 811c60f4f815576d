// Launches the kernel of squeeze-excite's gate.
#include "common/execute.cuh"
#include "squeeze_excite/kernel.cuh"

namespace effk::squeeze_excite {

void execute(const GateLaunch& plan, Stream stream) {
  with_type(plan.instance.dtype, [&](auto type) { launch(plan, gate<decltype(type)>, stream); });
}

}  // namespace effk::squeeze_excite
