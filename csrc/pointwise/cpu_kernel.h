// The 1x1 convolution on the CPU, forward and backward, with what is applied on load and what is summed on store.
#pragma once

#include "common/cpu_isa.h"
#include "common/types.h"

namespace effk {

// y = weight (act(scale x + shift) * gate) + bias + residual
struct PointwiseParams {
  Dtype dtype;
  Map x, y, residual;  // residual.data may be null
  const void* weight;  // [O, C], dense, of `dtype`
  Affine prologue;     // [C], of compute_t
  const void* gate;    // [N, C], of compute_t, or null
  const void* bias;    // [O], of compute_t, or null
  Reduce reduce;

  // How the work is cut, filled in by pointwise_plan. A unit is a band of pixels of one image.
  int64_t tile_pixels, band_pixels, bands;
  int64_t units;
  int64_t packed_size, scratch_size;  // bytes; scratch is per thread

  void* packed;
  double* partials;  // [N, bands, 2, O], as in map_pass
};

struct PointwiseBackwardParams {
  Dtype dtype;
  Map grad, y;         // [N, O, H, W]
  Map x;               // [N, C, H, W]
  Map grad_gated;      // like x, dense; null: not needed
  const void* weight;  // [O, C], dense, of `dtype`
  const void* scale;   // [N, O], of compute_t, or null
  NormBackward after;  // of y, to which the gradient goes back first
  NormBackward before;
  const void* gate;  // [N, C], of compute_t, or null
  bool need_weight;

  // A tile is pixels of one image. A unit is a part of the tiles and a group of the panels of x's channels.
  int64_t tile_pixels, image_tiles;
  int64_t parts, groups, units;
  int64_t padded;                                    // channels of x in whole vectors
  int64_t packed_size, scratch_size, products_size;  // bytes

  void* packed;
  void* sums;      // [N, image_tiles, 3, C], of compute_t, or null
  void* products;  // [parts][O][padded], of compute_t: dy (h * gate)^T
};

// Packing takes channels of x, rows of the weight in backward: any ranges that cover all, in any order.
// Weights are packed by blocks along the depth.
constexpr int64_t kPackDepth = 32;
inline int64_t pack_blocks(int64_t depth) { return (depth + kPackDepth - 1) / kPackDepth; }

#define EFFK_DECLARE(isa)                                                                                            \
  namespace isa {                                                                                                    \
  void pointwise_plan(PointwiseParams& params);                                                                      \
  void pointwise_pack(const PointwiseParams& params, int64_t first_block, int64_t last_block);                       \
  void pointwise_run(const PointwiseParams& params, int64_t first_unit, int64_t last_unit, void* scratch);           \
  void pointwise_backward_plan(PointwiseBackwardParams& params);                                                     \
  void pointwise_backward_pack(const PointwiseBackwardParams& params, int64_t first_block, int64_t last_block);      \
  void pointwise_backward_run(const PointwiseBackwardParams& params, int64_t first_unit, int64_t last_unit, void*);  \
  }
EFFK_EACH_PRODUCT_ISA(EFFK_DECLARE)
#undef EFFK_DECLARE

}  // namespace effk
