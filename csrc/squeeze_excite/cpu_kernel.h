// The gate of squeeze-excite on the CPU: gate(w2 act(w1 pooled + b1) + b2), and its backward.
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

struct SeGateBackwardParams {
  Dtype weight_dtype;
  GateWeights weights;  // without b2
  // Of compute_t. Rows of grad and pooled after the first may be missing.
  const void* grad;    // [1 or 3, N, C]
  const void* gates;   // [N, C]
  const void* pooled;  // [1 or 3, N, C]
  int64_t n, c, r;
  int32_t activation, gate;
  double area;

  void* shift;                                  // [N, C], of compute_t
  void* sums;                                   // [2, C], of compute_t; null where grad has one row
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2;  // as the weights and biases, of weight_dtype

  int64_t scratch_size;  // bytes, filled in by se_gate_backward_plan
  void* scratch;         // shared by all threads
};

// The backward takes ranges of images, then ranges of channels.
#define EFFK_DECLARE(isa)                                                                                            \
  namespace isa {                                                                                                    \
  void se_gate_plan(SeGateParams& params);                                                                           \
  void se_gate_pack(const SeGateParams& params);                                                                     \
  void se_gate_run(const SeGateParams& params, int64_t first_image, int64_t last_image, void* scratch);              \
  void se_gate_backward_plan(SeGateBackwardParams& params);                                                          \
  void se_gate_backward_images(const SeGateBackwardParams& params, int64_t first_image, int64_t last_image);         \
  void se_gate_backward_channels(const SeGateBackwardParams& params, int64_t first_channel, int64_t last_channel);   \
  }
EFFK_EACH_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
