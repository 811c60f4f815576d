#include "dwconv_backward/tiles.h"
#include "introspection/plans.h"
#include "introspection/registry.h"

namespace effk::introspection {

static std::optional<py::dict> dwconv_backward_plan(
    const MapArgument& grad, const MapArgument& y, const BackwardArgument& after, Address weight, const MapArgument& x,
    const TransformArgument& before, const MapArgument& grad_norm, const std::string& dtype, bool channels_last,
    int kernel_size, int stride, int pad_top, int pad_left, bool need_weight, const std::optional<MapArgument>& narrow,
    Address expand, int shared_per_block, Address grad_weight, Address sums, Address workspace) {
  dwconv_backward::Problem q{};
  q.grad = map_from(grad);
  q.y = map_from(y);
  q.after = backward_from(after);
  q.weight = reinterpret_cast<const void*>(weight);
  q.x = map_from(x);
  q.before = transform_from(before);
  q.grad_norm = map_from(grad_norm);
  q.dtype = dtype_from(dtype);
  q.channels_last = channels_last;
  q.kernel_size = kernel_size;
  q.stride = stride;
  q.pad_top = pad_top;
  q.pad_left = pad_left;
  q.need_weight = need_weight;
  if (narrow) {
    q.expands = true;
    q.narrow = map_from(*narrow);
    q.expand = reinterpret_cast<const void*>(expand);
    q.max_shared = shared_per_block;
  }
  const auto tile = best_tile(q);
  if (!tile) return std::nullopt;
  dwconv_backward::Plan plan = dwconv_backward::make_plan(q, *tile);
  return to_dict(plan, grad_weight, sums, workspace);
}

}  // namespace effk::introspection

EFFK_INTROSPECTION(m) {
  m.def("dwconv_backward_plan", &effk::introspection::dwconv_backward_plan, py::arg("grad"), py::arg("y"),
        py::arg("after"), py::arg("weight"), py::arg("x"), py::arg("before"), py::arg("grad_norm"), py::arg("dtype"),
        py::arg("channels_last"), py::arg("kernel_size"), py::arg("stride"), py::arg("pad_top"), py::arg("pad_left"),
        py::arg("need_weight"), py::arg("narrow") = py::none(), py::arg("expand") = 0,
        py::arg("shared_per_block") = effk::kLeastShared, py::arg("grad_weight") = 0, py::arg("sums") = 0,
        py::arg("workspace") = 0,
        "The CUDA launches of effkernels::dwconv_backward, or, of a `narrow` map, of expand_dwconv_backward; then None "
        "where that does not fit a block's shared memory.");
}
