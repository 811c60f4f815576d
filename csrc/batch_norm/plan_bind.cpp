#include "batch_norm/plan.h"
#include "introspection/plans.h"
#include "introspection/registry.h"

namespace effk::introspection {

static py::dict bn_backward_plan(const MapArgument& grad, const MapArgument& x, const MapArgument& grad_x,
                                 const std::string& dtype, bool channels_last, const BackwardArgument& transform,
                                 Address sums, Address workspace) {
  batch_norm::Problem q{};
  q.grad = map_from(grad);
  q.x = map_from(x);
  q.grad_x = map_from(grad_x);
  q.dtype = dtype_from(dtype);
  q.channels_last = channels_last;
  q.transform = backward_from(transform);
  batch_norm::Plan plan = batch_norm::make_plan(q);
  return to_dict(plan, 0, sums, workspace);
}

}  // namespace effk::introspection

EFFK_INTROSPECTION(m) {
  m.def("bn_backward_plan", &effk::introspection::bn_backward_plan, py::arg("grad"), py::arg("x"), py::arg("grad_x"),
        py::arg("dtype"), py::arg("channels_last"), py::arg("transform"), py::arg("sums") = 0, py::arg("workspace") = 0,
        "The CUDA launches of effkernels::bn_backward_sums and, given the address of grad_x, of bn_backward.");
}
