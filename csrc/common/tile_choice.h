// Which tile a launch takes: its heuristic's cheapest, or one that Python asks for. Host only.
//
// Of a launch's Problem q, its tiles.h says: for_each_tile(q, f) gives f each tile that is considered and its cost,
// shape_of(tile) the numbers that name it, accepted_tile(q, shape) the tile of these numbers or an error, and
// describe(q) all that the choice depends on.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/launch.h"

namespace effk {

// A tile in the numbers by which effkernels/ops/_tiles.py names it, such as {group, strips, width}.
using TileShape = std::vector<int>;

// Of tile_choice/cuda.cpp, in the library of the launchers.
bool tile_choice_in_use();  // whether a tile is asked for, or launches are recorded
std::optional<TileShape> tile_asked_for(const std::string& problem);
bool recording_launches();
void record_launch(const std::string& problem, const TileShape& taken, const std::vector<TileShape>& cheapest_first);

// The cheapest tile; none where nothing fits.
template <class Problem>
auto best_tile(const Problem& q) {
  std::optional<decltype(accepted_tile(q, TileShape{}))> best;
  double best_cost = 0;
  for_each_tile(q, [&](const auto& tile, double cost) {
    if (best && cost >= best_cost) return;
    best = tile;
    best_cost = cost;
  });
  return best;
}

template <class Problem>
std::vector<TileShape> tiles_cheapest_first(const Problem& q) {
  std::vector<std::pair<double, TileShape>> tiles;
  for_each_tile(q, [&](const auto& tile, double cost) { tiles.emplace_back(cost, shape_of(tile)); });
  std::stable_sort(tiles.begin(), tiles.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<TileShape> shapes;
  for (auto& [cost, shape] : tiles) shapes.push_back(std::move(shape));
  return shapes;
}

// What a launcher takes: the tile that is asked for, else the cheapest if that is `worthwhile`; none: no launch.
template <class Problem, class Worthwhile>
auto choose_tile(const Problem& q, Worthwhile worthwhile) {
  const auto best_if_worthwhile = [&] {
    auto best = best_tile(q);
    if (best && !worthwhile(*best)) best.reset();
    return best;
  };
  if (!tile_choice_in_use()) return best_if_worthwhile();
  const std::string problem = describe(q);
  const auto shape = tile_asked_for(problem);
  auto tile = shape ? std::optional(accepted_tile(q, *shape)) : best_if_worthwhile();
  if (tile && recording_launches()) record_launch(problem, shape_of(*tile), tiles_cheapest_first(q));
  return tile;
}

template <class Problem>
auto choose_tile(const Problem& q) {
  return choose_tile(q, [](const auto&) { return true; });
}

// Of the launches whose tile is {group, strips, width}: a group of channels, or of planes in NCHW, by strips of rows by
// columns of the map.
struct TileLimits {
  std::vector<int> groups, strips;
  int64_t width;  // of the map
  int lanes;      // channels of a thread
  int threads;    // at most so many, and
  int multiple;   // a multiple of so many
  int64_t shared;
};

inline std::vector<int> up_to(int64_t limit, std::initializer_list<int> values) {
  std::vector<int> found;
  found.reserve(values.size());
  for (int value : values)
    if (value <= limit) found.push_back(value);
  return found;
}

// In channels_last.
inline std::vector<int> channel_groups(int64_t channels, Dtype dtype) {
  const int64_t limit = round_up(channels, kVectorBytes / size_of(dtype));
  return limit < 8 ? std::vector<int>{int(limit)} : up_to(limit, {8, 16, 24, 32, 40, 48, 56, 64, 80, 96});
}

// Gives f the tiles make(group, strips, width) within the limits, of each group and strips the widest few.
template <class Make, class F>
void for_each_within(const TileLimits& limits, Make make, F f) {
  constexpr int kWidest = 128, kWidths = 4;
  for (int group : limits.groups) {
    for (int strips : limits.strips) {
      const int column = group / limits.lanes * strips;  // its threads
      const int64_t widest = std::min(kWidest, limits.threads / column);
      if (widest == 0) break;
      int considered = 0;
      for (int64_t cuts = ceil_div(limits.width, widest); considered < kWidths && cuts <= limits.width; ++cuts) {
        const int64_t step = limits.multiple / std::gcd(limits.multiple, column);
        const int width = int(round_up(ceil_div(limits.width, cuts), step));
        if (column * width > limits.threads) continue;
        const auto tile = make(group, strips, width);
        if (tile.shared > limits.shared) continue;
        ++considered;
        f(tile);
      }
    }
  }
}

// The tile that is asked for, if it is within the limits.
template <class Make>
auto accepted_within(const TileLimits& limits, const std::string& problem, const TileShape& shape, Make make) {
  const int group = shape[0], strips = shape[1], width = shape[2];
  const auto listed = [](const std::vector<int>& values) {
    std::string text;
    for (int value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
    return text;
  };
  const auto refuse = [&](const std::string& found) {
    const int step = limits.multiple;
    const std::string multiple = step > 1 ? "a multiple of " + std::to_string(step) + " and " : "";
    throw std::invalid_argument(
        problem + ": tile must have a group of " + listed(limits.groups) + ", strips of " + listed(limits.strips) +
        " and a width of 1 or more, with group / " + std::to_string(limits.lanes) + " * strips * width " + multiple +
        "at most " + std::to_string(limits.threads) + ", in at most " + std::to_string(limits.shared) +
        " bytes of shared memory; got group " + std::to_string(group) + ", strips " +
        std::to_string(strips) + ", width " + std::to_string(width) + found);
  };
  const auto among = [](const std::vector<int>& values, int value) {
    return std::find(values.begin(), values.end(), value) != values.end();
  };
  const int64_t threads = int64_t{group} / limits.lanes * strips * width;
  if (!among(limits.groups, group) || !among(limits.strips, strips) || width < 1 || threads > limits.threads ||
      threads % limits.multiple)
    refuse("");
  const auto tile = make(group, strips, width);
  if (tile.shared > limits.shared) refuse(", which takes " + std::to_string(tile.shared) + " bytes");
  return tile;
}

// What `describe` says of a problem's parts.
inline std::string sizes_of(const Map& map) {
  return std::to_string(map.n) + "x" + std::to_string(map.c) + "x" + std::to_string(map.h) + "x" +
         std::to_string(map.w);
}

inline std::string type_of(Dtype dtype, bool tf32) {
  return dtype == Dtype::kFloat16 ? "float16" : dtype == Dtype::kBFloat16 ? "bfloat16" : tf32 ? "tf32" : "float32";
}

inline std::string layout_of(bool channels_last) { return channels_last ? "channels_last" : "NCHW"; }

inline std::string window_of(int kernel_size, int stride) {
  return "k" + std::to_string(kernel_size) + " s" + std::to_string(stride);
}

inline std::string reduction_of(Reduce reduce) {
  return reduce == Reduce::kNone ? "no sums" : reduce == Reduce::kMean ? "means" : "statistics";
}

}  // namespace effk
