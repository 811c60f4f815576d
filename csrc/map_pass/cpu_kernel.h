// One pass over a feature map on the CPU: y = act(scale * x + shift), and sums of y; or the sums alone.
#pragma once

#include "cpu_isa.h"
#include "types.h"

namespace effk {

struct MapPassParams {
  Dtype dtype;
  Map x;
  Affine affine;         // of compute_t: [C], or scale [N, C]
  int64_t image_stride;  // from one image's scale to the next: 0 or C
  void* y;               // [N, C, H, W], dense, of `dtype`; null: not stored
  bool channels_last;
  Reduce reduce;

  // How the work is cut, filled in by map_pass_plan: one image x one band of rows (x one channel in NCHW) is a unit.
  int64_t band_rows, bands;
  int64_t units;
  int64_t scratch_size;  // bytes, per thread

  double* partials;  // [N, bands, 2, C]: sum and 0, or mean and sum of squared deviations
};

#define EFFK_DECLARE(isa)                                                                               \
  namespace isa {                                                                                       \
  void map_pass_plan(MapPassParams& params);                                                            \
  void map_pass_run(const MapPassParams& params, int64_t first_unit, int64_t last_unit, void* scratch); \
  }
EFFK_EACH_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
