// Means and variances of what a kernel stores: per-block partial results, merged in a fixed order.
#pragma once

#include <optional>

#include "common/launch.h"

namespace effk {

// Of a set of values. The mean is kept as its distance from one of them: rounded at 1000 it would spoil the variance of
// values that deviate by 1.
struct alignas(16) Moments {
  float count, origin, distance;  // mean = origin + distance
  float m2;                       // sum of squared deviations from the mean
};

// Where a kernel's blocks leave what they summed over their part of each map.
struct Reduction {
  float* mean;        // [N, C]: the result itself, where one block sees a whole map
  Moments* partials;  // [N, parts, C]
  bool shifts;        // sum from the first value on, for a variance; a mean near zero is exacter without
};

// A mean over each map: [N, C], or, where `partials` are given, to be merged from them.
struct Means {
  const float* mean;
  const Moments* partials;  // [N, parts, C]
  int parts;
};

struct MergeParams {
  const Moments* partials;  // [groups, parts, C]
  float* sums;              // the means [groups, C], then the biased variances if has_var
  int groups, parts, c;
  bool has_var;
};

// Of a block: channels side by side, each the work of kMergeThreads / kMergeColumns threads.
constexpr int kMergeColumns = 8;
constexpr int kMergeThreads = 256;

struct MergeInstance {};
using MergeLaunch = Launch<MergeInstance, MergeParams>;

inline std::string kernel_name(MergeInstance) {
  return "effk::merge_moments<" + std::to_string(kMergeThreads) + ">";
}

// A launch whose blocks sum what they store, and the one that merges their sums. Params has a member `reduction`.
template <class Instance, class Params>
struct ReducingPlan {
  Launch<Instance, Params> main;
  std::optional<MergeLaunch> merge;
  int64_t workspace_floats = 0;

  // Each map is seen by `parts` blocks per channel.
  void reduce(Reduce kind, int n, int parts, int c) {
    const bool statistics = kind == Reduce::kStatistics;
    main.params.reduction.shifts = statistics;
    direct_ = kind == Reduce::kMean && parts == 1;
    if (kind == Reduce::kNone || direct_) return;
    workspace_floats = int64_t{n} * parts * c * int64_t{sizeof(Moments) / sizeof(float)};
    MergeParams p{};
    p.groups = statistics ? 1 : n;
    p.parts = statistics ? to_int32(int64_t{n} * parts, "the number of partial sums") : parts;
    p.c = c;
    p.has_var = statistics;
    const int64_t blocks = p.groups * ceil_div(c, kMergeColumns);
    merge = MergeLaunch{{}, unsigned(to_int32(blocks, "the number of blocks")), kMergeThreads,
                        unsigned(kMergeThreads * sizeof(Moments)), p};
  }

  // `sums` is [N, C] for a mean over each map, [2, C] for batch statistics.
  void reduce_into(float* sums, float* workspace) {
    if (direct_) main.params.reduction.mean = sums;
    if (!merge) return;
    main.params.reduction.partials = reinterpret_cast<Moments*>(workspace);
    merge->params.partials = main.params.reduction.partials;
    merge->params.sums = sums;
  }

  // Leaves the merging of a mean to the kernel that reads it, after `reduce_into`.
  Means unmerged_means() {
    if (!merge) return {main.params.reduction.mean, nullptr, 0};
    const Means means{nullptr, merge->params.partials, merge->params.parts};
    merge.reset();
    return means;
  }

 private:
  bool direct_ = false;
};

}  // namespace effk
