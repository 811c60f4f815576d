// Sums that the blocks of a launch leave in parts, and the launch that adds them up in a fixed order.
#pragma once

#include <algorithm>
#include <optional>

#include "common/launch.h"

namespace effk {

struct AddPartsParams {
  const float* parts;  // [count, columns]
  float *first, *second;  // the sums: of the first `split` columns, and of the others
  int64_t columns, split;
  int count;
};

// Of a block: columns side by side, each the work of kAddThreads / kAddColumns threads.
constexpr int kAddColumns = 8;
constexpr int kAddThreads = 256;

struct AddPartsInstance {};
using AddPartsLaunch = Launch<AddPartsInstance, AddPartsParams>;

inline std::string kernel_name(AddPartsInstance) { return "effk::add_parts<" + std::to_string(kAddThreads) + ">"; }

// Where a kernel's blocks leave sums, those of part i at i * pitch.
struct PartialSums {
  float *first, *second;  // null: not needed
  int64_t pitch, split;   // second sums begin at `split`
};

// A launch whose blocks leave sums, and the one that adds them up. Params has a member `sums`.
template <class Instance, class Params>
struct SummingPlan {
  Launch<Instance, Params> main;
  std::optional<AddPartsLaunch> add;
  int64_t workspace_floats = 0;

  // Two kinds of sums, `first` and `second` values of each (0: not needed), in so many parts.
  void sum(int parts, int64_t first, int64_t second) {
    const int64_t columns = first + second;
    if (parts == 1 || columns == 0) return;
    workspace_floats = parts * columns;
    const int64_t blocks = ceil_div(columns, kAddColumns);
    add = AddPartsLaunch{{}, unsigned(to_int32(blocks, "the number of blocks")), kAddThreads,
                         unsigned(kAddThreads * sizeof(float)), {nullptr, nullptr, nullptr, columns, first, parts}};
  }

  // Null for what is not needed.
  void sum_into(float* first, float* second, float* workspace) {
    if (!add) {
      main.params.sums = {first, second, 0, 0};
      return;
    }
    AddPartsParams& p = add->params;
    p.parts = workspace;
    p.first = first;
    p.second = second;
    main.params.sums = {first ? workspace : nullptr, second ? workspace : nullptr, p.columns, p.split};
  }
};

}  // namespace effk
