#include "introspection/plans.h"
#include "introspection/registry.h"
#include "squeeze_excite/plan.h"

namespace effk::introspection {

static py::dict se_gate_plan(Address pooled, Address gate, Address reduce_weight, Address reduce_bias,
                             Address expand_weight, Address expand_bias, int64_t batch, int channels, int reduced,
                             const std::string& dtype, int activation, int gate_activation) {
  const Dtype type = dtype_from(dtype);
  const auto layer = [&](Address matrix, Address bias, int rows, int columns, int code) {
    return squeeze_excite::make_layer(reinterpret_cast<const void*>(matrix), reinterpret_cast<const void*>(bias), rows,
                                      columns, code, type);
  };
  const Means means{reinterpret_cast<const float*>(pooled), nullptr, 0};
  return to_dict(squeeze_excite::plan_gate(means, reinterpret_cast<float*>(gate),
                                           layer(reduce_weight, reduce_bias, reduced, channels, activation),
                                           layer(expand_weight, expand_bias, channels, reduced, gate_activation), batch,
                                           type));
}

}  // namespace effk::introspection

EFFK_INTROSPECTION(m) {
  m.def("se_gate_plan", &effk::introspection::se_gate_plan, py::arg("pooled"), py::arg("gate"),
        py::arg("reduce_weight"), py::arg("reduce_bias"), py::arg("expand_weight"), py::arg("expand_bias"),
        py::arg("batch"), py::arg("channels"), py::arg("reduced"), py::arg("dtype"), py::arg("activation"),
        py::arg("gate_activation"), "The CUDA launch of effkernels::se_gate.");
}
