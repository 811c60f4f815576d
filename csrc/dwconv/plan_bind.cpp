#include "dwconv/tiles.h"
#include "introspection/plans.h"
#include "introspection/registry.h"

namespace effk::introspection {

static py::dict dwconv_plan(const MapArgument& x, const MapArgument& y, const std::string& dtype, bool channels_last,
                            Address weight, const TransformArgument& prologue, const TransformArgument& epilogue,
                            int kernel_size, int stride, int pad_top, int pad_left, int reduce, Address sums,
                            Address workspace) {
  dwconv::Problem q{};
  q.x = map_from(x);
  q.y = map_from(y);
  q.dtype = dtype_from(dtype);
  q.channels_last = channels_last;
  q.weight = reinterpret_cast<const void*>(weight);
  q.prologue = transform_from(prologue);
  q.epilogue = transform_from(epilogue);
  q.kernel_size = kernel_size;
  q.stride = stride;
  q.pad_top = pad_top;
  q.pad_left = pad_left;
  q.reduce = static_cast<Reduce>(reduce);
  dwconv::Plan plan = dwconv::make_plan(q, *best_tile(q));
  return to_dict(plan, sums, workspace);
}

}  // namespace effk::introspection

EFFK_INTROSPECTION(m) {
  m.def("dwconv_plan", &effk::introspection::dwconv_plan, py::arg("x"), py::arg("y"), py::arg("dtype"),
        py::arg("channels_last"), py::arg("weight"), py::arg("prologue"), py::arg("epilogue"), py::arg("kernel_size"),
        py::arg("stride"), py::arg("pad_top"), py::arg("pad_left"), py::arg("reduce"), py::arg("sums") = 0,
        py::arg("workspace") = 0, "The CUDA launches of effkernels::dwconv.");
}
