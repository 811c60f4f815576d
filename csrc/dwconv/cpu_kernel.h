// Depthwise convolution on the CPU: y = act2(scale2 * conv(act1(scale1 * x + shift1)) + shift2), with sums of y.
#pragma once

#include "cpu_isa.h"
#include "types.h"

namespace effk {

struct DwconvParams {
  Dtype dtype;
  Map x;
  Expansion expand;    // what x is the output of if it is not in memory; then its pointer is null, and y channels_last
  const void* weight;  // [C, 1, k, k], dense, of `dtype`
  int32_t kernel_size;
  int32_t stride;
  int64_t pad_top, pad_left;
  Affine prologue;  // scale and shift are [C], of compute_t
  Affine epilogue;
  void* y;  // [N, C, out_h, out_w], dense, of `dtype`
  bool channels_last;
  int64_t out_h, out_w;
  Reduce reduce;

  // How the work is cut, filled in by dwconv_plan. A unit is one image x one chunk of channels x one band of rows.
  int64_t chunk_channels, chunks;
  int64_t band_rows, bands;
  int64_t units;
  int64_t packed_size;   // elements of compute_t
  int64_t scratch_size;  // elements of compute_t, per thread

  void* packed;      // [packed_size], written by dwconv_pack
  double* partials;  // [N, bands, 2, C]: sum and 0, or mean and sum of squared deviations
};

#define EFFK_DECLARE(isa)                                                                            \
  namespace isa {                                                                                    \
  void dwconv_plan(DwconvParams& params);                                                            \
  void dwconv_pack(const DwconvParams& params);                                                      \
  void dwconv_run(const DwconvParams& params, int64_t first_unit, int64_t last_unit, void* scratch); \
  }
EFFK_EACH_PRODUCT_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
