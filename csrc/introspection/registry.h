// How an op adds its launch plans to the introspection module (`effkernels._native.introspection` in Python).
//
// The op's folder has a file plan_bind.cpp, which the build finds by its name; nothing else names it:
//
//     #include "dwconv/plan.h"
//     #include "introspection/registry.h"
//
//     EFFK_INTROSPECTION(m) {
//       m.def("dwconv_plan", ...);  // map_pass/plan_bind.cpp is a short example
//     }
//
// The module links neither torch nor CUDA, so plan.h is plain host C++.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace effk::introspection {

namespace py = pybind11;

using Binder = void (*)(py::module_&);

// All binders of the module. A function, because it is first used before main, in an unknown order of files.
std::vector<Binder>& binders();

struct Registration {
  explicit Registration(Binder binder) { binders().push_back(binder); }
};

}  // namespace effk::introspection

// At most one per file; the body sees pybind11 as `py`.
#define EFFK_INTROSPECTION(module)                                             \
  namespace py = pybind11;                                                     \
  static void effk_bind(py::module_& module);                                  \
  static const effk::introspection::Registration effk_registration(effk_bind); \
  static void effk_bind(py::module_& module)
