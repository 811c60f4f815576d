// One pass over a map: y = gate * transform(x), and the moments of y as stored. The launch that normalises, that scales
// channels by squeeze-excite's gate, and that takes statistics without storing anything.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/moments.h"
#include "common/transform.h"

namespace effk::map_pass {

constexpr int kMaxThreads = 256;

struct Instance {
  bool channels_last;
  Dtype dtype;
};

inline std::string kernel_name(const Instance& i) {
  return std::string("effk::map_pass::") + (i.channels_last ? "channels_last<" : "nchw<") + cuda_name(i.dtype) + ">";
}

struct Problem {
  Map x, y;  // y.data may be null
  Dtype dtype;
  bool channels_last;  // the layout of y
  Transform transform;
  const float* gate;  // [N, C] or null
  Reduce reduce;
};

// A thread's items are its vectors: of channels at one pixel (channels_last), of columns of one plane (NCHW). The items
// of a map, or plane, are `rows` by `row_items`; they are cut into `parts` for as many blocks.
struct Items {
  int n, c;
  int group;    // channels (channels_last) or planes (NCHW) of a block
  int members;  // threads that share a part
  int rows, row_items, parts, part_items;
  int vector;  // elements of an item
};

struct Params {
  const void* x;
  void* y;
  const float* gate;
  Strides x_stride, y_stride;
  Transform transform;
  Reduction reduction;
  Items items;
  bool x_aligned, y_aligned;  // channels_last: whether an item is one access; in NCHW it always is
};

using Plan = ReducingPlan<Instance, Params>;

// What an NCHW block knows of each of its planes.
struct PlaneInfo {
  int64_t x, y;  // offsets
  Normalize normalize;
  float gate;
};

// Rows that follow each other without a gap are one row.
inline bool is_flat(const Map& m) { return m.h == 1 || m.stride_h == m.w * m.stride_w; }

struct Cut {
  Items items;
  int64_t blocks;
  int threads;
};

// How blocks and threads share maps of one shape. Where all are flat, each becomes one row. An item has `vector` elements,
// in NCHW at most.
inline Cut cut(std::initializer_list<Map*> maps, Dtype dtype, bool channels_last, int vector) {
  constexpr int kItemsPerThread = 16, kEnoughBlocks = 512, kChannelVectors = 64;
  if (std::all_of(maps.begin(), maps.end(), [](const Map* m) { return is_flat(*m); }))
    for (Map* m : maps) {
      m->w *= m->h;
      m->h = 1;
      m->stride_h = 0;
    }
  const Map& x = **maps.begin();
  Cut cut{};
  Items& p = cut.items;
  to_int32(x.n * x.c, "batch times channels");
  p.n = to_int32(x.n, "the batch");
  p.c = to_int32(x.c, "the number of channels");
  p.rows = to_int32(x.h, "the height");
  p.vector = vector;
  if (channels_last) {
    p.row_items = to_int32(x.w, "the size of a map");
    const int64_t vectors = ceil_div(p.c, p.vector), groups = ceil_div(vectors, kChannelVectors);
    const int lanes = int(ceil_div(vectors, groups));
    p.members = int(std::min<int64_t>(kMaxThreads / lanes, int64_t{p.rows} * p.row_items));
    p.group = lanes * p.vector;
    cut.threads = lanes * p.members;
    cut.blocks = p.n * groups;
  } else {
    for (const Map* m : maps) p.vector = std::min(p.vector, widest_vector(*m, dtype, false));
    p.row_items = to_int32(x.w / p.vector, "the size of a map");
    p.members = int(std::min<int64_t>(kMaxThreads, int64_t{p.rows} * p.row_items));
    p.group = int(std::min<int64_t>(kMaxThreads / p.members, int64_t{p.n} * p.c));
    cut.threads = p.group * p.members;
    cut.blocks = ceil_div(int64_t{p.n} * p.c, p.group);
  }
  const int64_t items = int64_t{p.rows} * p.row_items, rounds = ceil_div(items, p.members);
  const int64_t wanted = std::min(ceil_div(kEnoughBlocks, cut.blocks), ceil_div(rounds, 2));
  const int64_t parts = std::max(ceil_div(rounds, kItemsPerThread), wanted);
  p.part_items = int(ceil_div(rounds, parts)) * p.members;
  p.parts = int(ceil_div(items, p.part_items));
  cut.blocks *= p.parts;
  return cut;
}

// A problem must not be empty.
inline Plan make_plan(const Problem& q) {
  Map x = q.x, y = q.y;
  const Cut c = cut({&x, &y}, q.dtype, q.channels_last, kVectorBytes / size_of(q.dtype));
  Plan plan;
  Params& p = plan.main.params = Params{};
  p.x = x.data;
  p.y = const_cast<void*>(y.data);
  p.gate = q.gate;
  p.x_stride = strides_of(x);
  p.y_stride = strides_of(y);
  p.transform = q.transform;
  p.items = c.items;
  const int vector = c.items.vector;
  p.x_aligned = vectorizes(x, q.dtype, q.channels_last, vector);
  p.y_aligned = vectorizes(y, q.dtype, q.channels_last, vector);
  int shared = q.channels_last ? 0 : c.items.group * int(sizeof(PlaneInfo));
  if (q.reduce != Reduce::kNone)
    shared = std::max(shared, c.threads * (q.channels_last ? vector : 1) * int(sizeof(Moments)));
  plan.main.instance = {q.channels_last, q.dtype};
  plan.main.grid = unsigned(to_int32(c.blocks, "the number of blocks"));
  plan.main.block = unsigned(c.threads);
  plan.main.shared_bytes = unsigned(shared);
  plan.reduce(q.reduce, c.items.n, c.items.parts, c.items.c);
  return plan;
}

void execute(const Plan& plan, Stream stream);  // cuda_kernel.cu

}  // namespace effk::map_pass
