// The backward of the depthwise convolution on the CPU: the gradients of its input and of its weight from one pass. With
// an expansion before it, so that neither its input nor the gradient of that is in memory, those of the expansion too.
#pragma once

#include "common/cpu_isa.h"
#include "common/types.h"

namespace effk {

struct DwconvBackwardParams {
  Dtype dtype;
  Map grad, y;         // [N, C, out_h, out_w]: (grad * scale + shift) is the gradient of act(after(y))
  Map x;               // [N, C, H, W]; the convolution's input is act(before(x))
  Expansion expand;    // what x is the output of if it is not in memory; then its pointer is null
  Map grad_norm;       // like x, dense: the gradient of before(x); null: not needed
  const void* weight;  // [C, 1, k, k], dense, of `dtype`
  int32_t kernel_size, stride;
  int64_t pad_top, pad_left;
  const void *scale, *shift;  // [N, C], of compute_t, or null
  NormBackward after, before;
  bool need_weight;

  // With an expansion, and dz the gradient of before(x) times before.scale:
  Map grad_x;          // like expand.x, dense: expand.weight^T dz; null: not needed
  const void* centre;  // [expand.x.c], of compute_t, taken off expand.x in expand_products; null: nothing

  // How the work is cut, filled in by dwconv_backward_plan. A unit is one image x one chunk of channels (with an
  // expansion all of them, one after the other) x one band of rows of x.
  int64_t chunk_channels, chunks, band_rows, bands, units;
  int64_t padded, expand_padded;       // channels of x and of expand.x, up to whole vectors
  int64_t packed_size, products_size;  // bytes
  int64_t expand_products_size;        // bytes
  int64_t scratch_size;                // bytes, per thread

  void* packed;
  void* products;  // [N, bands, k * k, padded], of compute_t: the weight's gradient
  void* sums;      // [N, bands, 2, padded], of compute_t: of grad_norm and of grad_norm * (x - mean); null: not needed
  void* expand_products;  // [N, bands, C, expand_padded], of compute_t: dz (expand.x - centre)^T; null: not needed
};

#define EFFK_DECLARE(isa)                                                                                 \
  namespace isa {                                                                                         \
  void dwconv_backward_plan(DwconvBackwardParams& params);                                                \
  void dwconv_backward_pack(const DwconvBackwardParams& params);                                          \
  void dwconv_backward_run(const DwconvBackwardParams& params, int64_t first, int64_t last, void* scratch); \
  }
EFFK_EACH_PRODUCT_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
