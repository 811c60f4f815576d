// A whole MBConv block on the CPU, in inference:
//
//     e = act1(bn1(w1 x)), d = act2(bn2(depthwise(e))), g = gate(mean of d), y = bn3(w3 (g d)) [+ x]
//
// e exists only as rows in a ring in the cache; d is written once and read once, in scratch memory.
#pragma once

#include "../squeeze_excite/cpu_kernel.h"

namespace effk {

// The convolutions as PyTorch has them, dense and of MbconvParams::dtype, with their BatchNorms folded.
struct MbconvWeights {
  const void* expand;  // [hidden, C]
  Affine expand_norm;
  const void* depthwise;  // [hidden, 1, k, k]
  Affine depthwise_norm;
  const void* project;  // [out_c, hidden]
  Affine project_norm;
  Dtype gate_dtype;
  GateWeights gate;
};

struct MbconvParams {
  Dtype dtype;
  Map x;
  void* y;             // [N, out_c, out_h, out_w], dense, of `dtype`
  bool channels_last;  // the layout of y
  int64_t hidden, out_c;
  bool has_expand;  // else hidden is C and e is x
  int32_t act1, act2;
  int32_t kernel_size, stride;
  int64_t pad_top, pad_left, out_h, out_w;
  int64_t squeezed;  // 0: no gate
  int32_t squeeze_act, gate;
  bool residual;
  const void* packed;  // [mbconv_packed_size], of compute_t, written by mbconv_pack

  // How the work is cut, filled in by mbconv_plan. Sizes are in elements of compute_t.
  int64_t bands, band_rows;      // of output rows in the first phase
  int64_t splits, split_pixels;  // of output pixels in the last phase
  int64_t shares;                // of panels of output channels there
  int64_t image_size;            // of what the phases hand on: x where it is staged, d, its sums and the gates
  int64_t scratch_size;          // per thread
};

// The phases, with a barrier between them, and their units of work.
enum class MbconvPhase {
  kWhole,      // all of them, image by image
  kStage,      // image x range of pixels of x; none where x can be read as it lies
  kDepthwise,  // image x chunk of channels x band of rows
  kGate,       // image; none without a gate
  kProject,    // image x share of the output channels x range of pixels
};

// In the order in which they follow each other, where they are shared out.
constexpr MbconvPhase kSharedPhases[] = {MbconvPhase::kStage, MbconvPhase::kDepthwise, MbconvPhase::kGate,
                                         MbconvPhase::kProject};

#define EFFK_DECLARE(isa)                                                                                          \
  namespace isa {                                                                                                  \
  int64_t mbconv_packed_size(const MbconvParams& params);                                                          \
  void mbconv_plan(MbconvParams& params, int64_t threads);                                                         \
  int64_t mbconv_pack_units(const MbconvParams& params);                                                           \
  void mbconv_pack(const MbconvParams& params, const MbconvWeights& weights, void* packed, int64_t first,          \
                   int64_t last);                                                                                  \
  int64_t mbconv_units(const MbconvParams& params, MbconvPhase phase);                                             \
  /* `images` has room for one image in kWhole, else for all. */                                                   \
  void mbconv_run(const MbconvParams& params, MbconvPhase phase, int64_t first, int64_t last, void* images,        \
                  void* scratch);                                                                                  \
  }
EFFK_EACH_PRODUCT_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
