#include "introspection/plans.h"
#include "introspection/registry.h"
#include "pointwise_inference/tiles.h"

namespace effk::introspection {

static py::dict pointwise_inference_plan(const MapArgument& x, const MapArgument& y,
                                         const std::optional<MapArgument>& residual, const std::string& dtype,
                                         Address weight, Address gate, const TransformArgument& epilogue,
                                         bool tf32) {
  pointwise_inference::Problem q{};
  q.x = map_from(x);
  q.y = map_from(y);
  if (residual) q.residual = map_from(*residual);
  q.dtype = dtype_from(dtype);
  q.tf32 = tf32;
  q.weight = reinterpret_cast<const void*>(weight);
  q.gate = reinterpret_cast<const float*>(gate);
  q.epilogue = transform_from(epilogue);
  return to_dict(pointwise_inference::make_plan(q, *best_tile(q)));
}

}  // namespace effk::introspection

EFFK_INTROSPECTION(m) {
  m.def("pointwise_inference_plan", &effk::introspection::pointwise_inference_plan, py::arg("x"), py::arg("y"),
        py::arg("residual"), py::arg("dtype"), py::arg("weight"), py::arg("gate"), py::arg("epilogue"),
        py::arg("tf32"),
        "The CUDA launch of effkernels::pointwise_inference.");
}
