// The gate of squeeze-excite on the CPU: gate(w2 act(w1 pooled + b1) + b2).
#pragma once

#include "cpu_isa.h"
#include "types.h"

namespace effk {

struct SeGateParams {
  Dtype weight_dtype;  // of the weights and biases
  const void* pooled;  // [N, C], of compute_t
  const void* w1;      // [R, C]
  const void* b1;      // [R] or null
  const void* w2;      // [C, R]
  const void* b2;      // [C] or null
  void* out;           // [N, C], of compute_t
  int64_t c, r;
  int32_t activation, gate;
};

// One unit is one image; scratch holds r elements of compute_t.
#define EFFK_DECLARE(isa)                                                                             \
  namespace isa {                                                                                     \
  void se_gate_run(const SeGateParams& params, int64_t first_image, int64_t last_image, void* scratch); \
  }
EFFK_EACH_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
