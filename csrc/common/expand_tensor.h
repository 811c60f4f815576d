// The map that a kernel works on, in memory or as the output of a 1x1 convolution that is never stored.
#pragma once

#include "common/cpu_tensor.h"

namespace effk {

class ExpandedMap {
 public:
  // x, or `expand` [channels, C] times x.
  ExpandedMap(const Tensor& x, const std::optional<Tensor>& expand) : map_(map_of(x)) {
    if (!expand) return;
    require(expand->dim() == 2 && expand->size(1) == map_.c && expand->scalar_type() == x.scalar_type(),
            "effkernels: expand must be [hidden, C], of the dtype of x");
    weight_ = torch::stable::contiguous(*expand);
    expansion_ = {map_, weight_->const_data_ptr()};
    map_ = {nullptr, map_.n, expand->size(0), map_.h, map_.w, 0, 0, 0, 0};
  }

  const Map& map() const { return map_; }
  const Expansion& expansion() const { return expansion_; }

 private:
  Map map_;
  Expansion expansion_{};
  std::optional<Tensor> weight_;
};

}  // namespace effk
