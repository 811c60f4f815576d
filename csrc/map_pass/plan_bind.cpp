#include "map_pass/plan.h"
#include "introspection/plans.h"
#include "introspection/registry.h"

namespace effk::introspection {

static py::dict map_pass_plan(const MapArgument& x, const MapArgument& y, const std::string& dtype, bool channels_last,
                               const TransformArgument& transform, Address gate, int reduce, Address sums,
                               Address workspace) {
  map_pass::Problem q{};
  q.x = map_from(x);
  q.y = map_from(y);
  q.dtype = dtype_from(dtype);
  q.channels_last = channels_last;
  q.transform = transform_from(transform);
  q.gate = reinterpret_cast<const float*>(gate);
  q.reduce = static_cast<Reduce>(reduce);
  map_pass::Plan plan = map_pass::make_plan(q);
  return to_dict(plan, sums, workspace);
}

}  // namespace effk::introspection

EFFK_INTROSPECTION(m) {
  m.def("map_pass_plan", &effk::introspection::map_pass_plan, py::arg("x"), py::arg("y"), py::arg("dtype"),
        py::arg("channels_last"), py::arg("transform"), py::arg("gate"), py::arg("reduce"), py::arg("sums") = 0,
        py::arg("workspace") = 0,
        "The CUDA launches of effkernels::bn_statistics, bn_apply, spatial_mean and channel_scale.");
}
