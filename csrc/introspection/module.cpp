#include <string>
#include <vector>

#include "build_info.h"
#include "common/cpu_isa.h"
#include "introspection/registry.h"

namespace effk::introspection {

std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

static std::vector<std::string> available_cpu_isas() {
  std::vector<std::string> names;
  for (CpuIsa isa : kCpuIsas)
    if (isa <= best_cpu_isa()) names.emplace_back(cpu_isa_name(isa));
  return names;
}

PYBIND11_MODULE(_introspection, m) {
  m.doc() = "What was built, what runs, and the launch plan of each CUDA kernel.";
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(EFFK_BUILD_INFO); },
      "Versions, compilers, flags, CPU instruction sets and CUDA architectures of this build.");
  m.def("cpu_isa", [] { return cpu_isa_name(cpu_isa()); }, "The instruction set whose CPU kernels run here.");
  m.def("available_cpu_isas", &available_cpu_isas, "The instruction sets that this CPU has, the least one first.");
  for (Binder bind : binders()) bind(m);
}

}  // namespace effk::introspection
