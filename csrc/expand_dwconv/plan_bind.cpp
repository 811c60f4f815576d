#include "expand_dwconv/tiles.h"
#include "introspection/plans.h"
#include "introspection/registry.h"

namespace effk::introspection {

static std::optional<py::dict> expand_dwconv_plan(const MapArgument& x, const MapArgument& d, const std::string& dtype,
                                                  Address expand, const TransformArgument& norm1, Address depthwise,
                                                  const TransformArgument& norm2, int kernel_size, int stride,
                                                  int pad_top, int pad_left, int reduce, bool tf32,
                                                  int shared_per_block, Address sums, Address workspace,
                                                  int multiprocessors) {
  expand_dwconv::Problem q{};
  q.x = map_from(x);
  q.d = map_from(d);
  q.dtype = dtype_from(dtype);
  q.expand = reinterpret_cast<const void*>(expand);
  q.depthwise = reinterpret_cast<const void*>(depthwise);
  q.norm1 = transform_from(norm1);
  q.norm2 = transform_from(norm2);
  q.kernel_size = kernel_size;
  q.stride = stride;
  q.pad_top = pad_top;
  q.pad_left = pad_left;
  q.reduce = static_cast<Reduce>(reduce);
  q.tf32 = tf32;
  q.gpu.multiprocessors = multiprocessors;
  q.gpu.shared_per_block = shared_per_block;
  const auto tile = best_tile(q);
  if (!tile) return std::nullopt;
  expand_dwconv::Plan plan = expand_dwconv::make_plan(q, *tile);
  py::dict dict = to_dict(plan, sums, workspace);
  dict["worthwhile"] = expand_dwconv::worthwhile(q, *tile);
  py::dict shape;
  shape["group"] = tile->group;
  shape["strips"] = tile->strips;
  shape["width"] = tile->tile_w;
  shape["groups_each"] = tile->groups_each;
  dict["tile"] = shape;
  return dict;
}

}  // namespace effk::introspection

EFFK_INTROSPECTION(m) {
  m.def("expand_dwconv_plan", &effk::introspection::expand_dwconv_plan, py::arg("x"), py::arg("d"), py::arg("dtype"),
        py::arg("expand"), py::arg("norm1"), py::arg("depthwise"), py::arg("norm2"), py::arg("kernel_size"),
        py::arg("stride"), py::arg("pad_top"), py::arg("pad_left"), py::arg("reduce"), py::arg("tf32"),
        py::arg("shared_per_block") = effk::kLeastShared, py::arg("sums") = 0, py::arg("workspace") = 0,
        py::arg("multiprocessors") = effk::expand_dwconv::Gpu().multiprocessors,
        "The CUDA launches of effkernels::expand_dwconv on the least GPU since sm_80; None where nothing fits.");
}
