// A dense convolution on the CPU, in inference: y = act(scale * conv(x) + shift) [+ shortcut].
//
// An implicit matrix product: the k rows under an output row, padded and with channels innermost, are the left operand
// as they lie, and are staged once for all output channels. In float32, 3x3 convolutions of stride 1 go by Winograd's
// algorithm, so that the stride counts when a weight is packed.
#pragma once

#include "cpu_isa.h"
#include "types.h"

namespace effk {

// [out_c, C, kernel_h, kernel_w], of ConvParams::dtype, in any layout: the steps from one to the next, in elements.
struct ConvWeight {
  const void* data;
  int64_t out, channel, row, column;
};

struct ConvParams {
  Dtype dtype;
  Map x;
  int64_t out_c, out_h, out_w;
  int64_t kernel_h, kernel_w, stride;
  int64_t pad_top, pad_left;
  int32_t activation;
  void* y;             // [N, out_c, out_h, out_w], dense, of `dtype`
  bool channels_last;  // the layout of y
  bool has_shortcut;
  Map shortcut;        // of the sizes of y
  const void* packed;  // [conv_packed_size], of compute_t, written by conv_pack

  // How the work is cut, filled in by conv_plan: a unit is one image x one rectangle of output pixels x one share of the
  // panels of output channels.
  int64_t rect_h, rect_w, rects;
  int64_t shares;
  int64_t units;
  int64_t scratch_size;  // elements of compute_t, per thread
};

#define EFFK_DECLARE(isa)                                                                                  \
  namespace isa {                                                                                          \
  int64_t conv_packed_size(const ConvParams& params);                                                      \
  int64_t conv_pack_units(const ConvParams& params);                                                       \
  void conv_pack(const ConvParams& params, const ConvWeight& weight, const Affine& norm, void* packed,     \
                 int64_t first, int64_t last);                                                             \
  void conv_plan(ConvParams& params, int64_t threads);                                                     \
  void conv_run(const ConvParams& params, int64_t first_unit, int64_t last_unit, void* scratch);           \
  }
EFFK_EACH_PRODUCT_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
