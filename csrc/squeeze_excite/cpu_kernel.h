// The gate of squeeze-excite on the CPU: gate(w2 act(w1 pooled + b1) + b2).
#pragma once

#include "cpu_isa.h"
#include "types.h"

namespace effk {

struct GateWeights {
  const void* w1;  // [R, C]
  const void* b1;  // [R] or null
  const void* w2;  // [C, R]
  const void* b2;  // [C] or null
};

struct SeGateParams {
  Dtype weight_dtype;  // of the weights and biases
  GateWeights weights;
  const void* pooled;  // [N, C], of compute_t
  void* out;           // [N, C], of compute_t
  int64_t c, r;
  int32_t activation, gate;

  // Filled in by se_gate_plan, in elements of compute_t.
  int64_t packed_size;
  int64_t scratch_size;  // per thread

  void* packed;  // [packed_size], written by se_gate_pack
};

#define EFFK_DECLARE(isa)                                                                                \
  namespace isa {                                                                                        \
  void se_gate_plan(SeGateParams& params);                                                               \
  void se_gate_pack(const SeGateParams& params);                                                         \
  void se_gate_run(const SeGateParams& params, int64_t first_image, int64_t last_image, void* scratch);  \
  }
EFFK_EACH_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
