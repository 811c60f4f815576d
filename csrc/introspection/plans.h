// Launch plans as Python objects. Tensors come in as (address, sizes, strides).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "common/moments.h"
#include "common/partial_sums.h"
#include "common/transform.h"

namespace effk::introspection {

namespace py = pybind11;

using Address = uintptr_t;
using MapArgument = std::tuple<Address, std::array<int64_t, 4>, std::array<int64_t, 4>>;

inline Dtype dtype_from(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "bfloat16") return Dtype::kBFloat16;
  throw std::invalid_argument("dtype must be float32, float16 or bfloat16, got " + name);
}

inline Map map_from(const MapArgument& argument) {
  const auto& [address, size, stride] = argument;
  return {reinterpret_cast<void*>(address), size[0],   size[1],   size[2],  size[3],
          stride[0],                        stride[1], stride[2], stride[3]};
}

// Addresses of mean, var, gamma and beta (0: none), eps, the bits of those in float32, the activation's code.
using TransformArgument = std::tuple<std::array<Address, 4>, float, uint32_t, int>;

inline Transform transform_from(const TransformArgument& argument) {
  const auto& [data, eps, float32, activation] = argument;
  const auto pointer = [&](int i) { return reinterpret_cast<const void*>(data[i]); };
  return make_transform(pointer(0), pointer(1), pointer(2), pointer(3), eps, float32, activation);
}

// A BatchNorm that is passed backward: scale and shift per image, and the gradients' means (0: none).
using BackwardArgument = std::tuple<TransformArgument, Address, Address, Address>;

inline BackwardTransform backward_from(const BackwardArgument& argument) {
  const auto& [forward, scale, shift, means] = argument;
  const auto pointer = [](Address address) { return reinterpret_cast<const float*>(address); };
  return {transform_from(forward), pointer(scale), pointer(shift), pointer(means)};
}

// {kernel, grid, block, shared_bytes, params}: a C++ name, three numbers, and the kernel's only argument as bytes.
template <class Instance, class Params>
py::dict to_dict(const Launch<Instance, Params>& launch) {
  py::dict dict;
  dict["kernel"] = kernel_name(launch.instance);
  dict["grid"] = launch.grid;
  dict["block"] = launch.block;
  dict["shared_bytes"] = launch.shared_bytes;
  dict["params"] = py::bytes(reinterpret_cast<const char*>(&launch.params), sizeof(Params));
  return dict;
}

// {launches, workspace_floats}; `last` may be missing.
template <class Main, class Last>
py::dict to_dict(const Main& main, const Last& last, int64_t workspace_floats) {
  py::list launches;
  launches.append(to_dict(main));
  if (last) launches.append(to_dict(*last));
  py::dict dict;
  dict["launches"] = launches;
  dict["workspace_floats"] = workspace_floats;
  return dict;
}

template <class Instance, class Params>
py::dict to_dict(ReducingPlan<Instance, Params>& plan, Address sums, Address workspace) {
  plan.reduce_into(reinterpret_cast<float*>(sums), reinterpret_cast<float*>(workspace));
  return to_dict(plan.main, plan.merge, plan.workspace_floats);
}

template <class Instance, class Params>
py::dict to_dict(SummingPlan<Instance, Params>& plan, Address first, Address second, Address workspace) {
  const auto pointer = [](Address address) { return reinterpret_cast<float*>(address); };
  plan.sum_into(pointer(first), pointer(second), pointer(workspace));
  return to_dict(plan.main, plan.add, plan.workspace_floats);
}

}  // namespace effk::introspection
