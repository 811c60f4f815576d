// Passes over a map around a BatchNorm on the CPU, with z = scale * x + shift: the sums that a backward pass wants, and
// the end of a residual branch.
#pragma once

#include "common/cpu_isa.h"
#include "common/types.h"

namespace effk {

struct NormPassParams {
  enum Kind : int32_t {
    kPool,          // sums [3]: act(z), act'(z), act'(z) * (x - mean)
    kPoolOnly,      // sums [1]: act(z)
    kBackwardSums,  // sums [2]: dz and dz * (x - mean) with dz = (other * factor + added) * act'(z)
    kBackward,      // y = the gradient of x from that dz
    kResidual,      // y = z * factor + other
  } kind;
  Dtype dtype;
  Map x, other, y;             // [N, C, H, W]; what a kind does not read or write has no data
  NormBackward norm;           // with a slope for kBackward alone
  const void *factor, *added;  // [N, C], of compute_t, or null

  // How the work is cut, filled in by norm_pass_plan. A unit is a band of pixels of one image.
  int64_t tile_pixels, band_pixels, bands, units;
  int64_t padded, sums_count;  // channels, up to whole vectors; sums of each channel
  int64_t scratch_size;        // bytes, per thread

  void* sums;  // [N, bands, sums_count, padded], of compute_t
};

#define EFFK_DECLARE(isa)                                                                        \
  namespace isa {                                                                                \
  void norm_pass_plan(NormPassParams& params);                                                   \
  void norm_pass_run(const NormPassParams& params, int64_t first, int64_t last, void* scratch);  \
  }
EFFK_EACH_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
