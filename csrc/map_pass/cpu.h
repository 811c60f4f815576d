// map_pass on tensors, for the ops that are one.
#pragma once

#include "../map_pass/cpu_kernel.h"
#include "cpu_tensor.h"

namespace effk {

// y (if `store`) and its sums (unless Reduce::kNone), as MapPassParams says.
inline std::tuple<std::optional<Tensor>, std::optional<Tensor>> map_pass(const Tensor& x, const Affine& affine,
                                                                         int64_t image_stride, bool store,
                                                                         Reduce reduce) {
  const bool channels_last = is_channels_last(x);
  std::optional<Tensor> y, sums;
  if (store) y = empty_map(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last);

  MapPassParams p{};
  p.dtype = dtype_of(x);
  p.x = map_of(x);
  p.affine = affine;
  p.image_stride = image_stride;
  p.y = y ? y->mutable_data_ptr() : nullptr;
  p.channels_last = channels_last;
  p.reduce = reduce;
  EFFK_CPU_FUNCTION(map_pass_plan)(p);
  std::vector<double> partials(reduce == Reduce::kNone ? 0 : p.x.n * p.bands * 2 * p.x.c);
  p.partials = partials.data();
  const auto run = EFFK_CPU_FUNCTION(map_pass_run);
  for_units(p.units, [&](int64_t begin, int64_t end) {
    run(p, begin, end, scratch<1>(p.scratch_size));
  });
  if (reduce != Reduce::kNone)
    sums = merge_partials(x, p.partials, p.bands, reduce, [&](int64_t band) {
      return static_cast<double>(std::min(p.band_rows, p.x.h - band * p.band_rows) * p.x.w);
    });
  return {y, sums};
}

}  // namespace effk
