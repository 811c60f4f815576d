// The rest of the emulated GPU: its shared memory, its one device and stream for PyTorch, and its controls.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cuda_runtime.h"

namespace effk {
__shared__ __align__(16) unsigned char dynamic_shared[cuda_on_cpu::kMaxShared];
}

// In the place of those in libtorch_cuda, by -Bsymbolic.
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

extern "C" void cuda_on_cpu_set_seed(uint32_t seed) { cuda_on_cpu::block.order.seed(seed); }
extern "C" void cuda_on_cpu_set_multiprocessors(int count) { cuda_on_cpu::multiprocessors = count; }
extern "C" void cuda_on_cpu_set_launcher(cuda_on_cpu::Launcher launcher) { cuda_on_cpu::launcher = launcher; }
