// y = gate * transform(x) and the moments of y.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/moments.cuh"
#include "map_pass/plan.h"
#include "common/transform.cuh"

namespace effk::map_pass {

// The items of one thread, kBatch at a time, so that as many loads are in flight: load(i, row, column, exists) for each
// of a batch, then use(i, whether it is the first of all) for those that exist.
template <int kBatch, class Load, class Use>
__device__ __forceinline__ void for_each_item(const Items& p, int part, int member, Load load, Use use) {
  const int first = part * p.part_items + member, end = min((part + 1) * p.part_items, p.rows * p.row_items);
  const int step_row = p.members / p.row_items, step_column = p.members % p.row_items;
  int row = first / p.row_items, column = first % p.row_items;
  for (int item = first; item < end; item += kBatch * p.members) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      load(i, row, column, item + i * p.members < end);
      row += step_row;
      column += step_column;
      if (column >= p.row_items) {
        column -= p.row_items;
        ++row;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (item + i * p.members >= end) break;
      use(i, i == 0 && item == first);
    }
  }
}

// y = transform(x) of one thread's items, and sum(y as stored). `step` is from item to item in a row, `inner` within an
// item.
template <int V, class T, class Function, class Sum>
__device__ __forceinline__ void transform_items(const Params& p, const T* x, T* y, int64_t x_step, int64_t y_step,
                                                int64_t x_inner, int64_t y_inner, int valid, bool x_aligned,
                                                bool y_aligned, int part, int member, Function transform, Sum sum) {
  constexpr int kBatch = V == 8 ? 2 : 4;
  Vec<T, V> vec[kBatch];
  T* out[kBatch];
  for_each_item<kBatch>(
      p.items, part, member,
      [&](int i, int row, int column, bool exists) {
        const T* from = x + int64_t{row} * p.x_stride.h + column * x_step;
        vec[i] = load_some<V>(from, x_inner, exists ? valid : 0, x_aligned);
        out[i] = y + int64_t{row} * p.y_stride.h + column * y_step;
      },
      [&](int i, bool is_first) {
        float values[V];
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = to_float(vec[i].at[v]);
        transform(values);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          vec[i].at[v] = from_float<T>(values[v]);
          values[v] = to_float(vec[i].at[v]);
        }
        if (p.y) store_some<V>(out[i], vec[i], y_inner, valid, y_aligned);
        sum(values, is_first);
      });
}

// How many items the thread has.
__device__ __forceinline__ int item_count(const Items& p, int part, int member) {
  const int items = min(p.part_items, p.rows * p.row_items - part * p.part_items);
  return (items - member + p.members - 1) / p.members;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) channels_last(const Params p) {
  constexpr int V = kVector<T>;
  const Items& items = p.items;
  unsigned char* shared = shared_memory();
  const int groups = (items.c + items.group - 1) / items.group, lanes = items.group / V;
  const int part = blockIdx.x / groups % items.parts;
  const int64_t n = blockIdx.x / groups / items.parts;
  const int lane = threadIdx.x % lanes * V, member = threadIdx.x / lanes;
  const int c = blockIdx.x % groups * items.group + lane, valid = min(V, items.c - c);

  const ChannelTransform<T, V> transform(p.transform, c, valid);
  float gate[V];
#pragma unroll
  for (int v = 0; v < V; ++v) gate[v] = p.gate && v < valid ? load_global(p.gate + n * items.c + c + v) : 1.0f;
  const bool reduces = p.reduction.mean || p.reduction.partials;
  ShiftedSums<V> sums;
  transform_items<V>(
      p, static_cast<const T*>(p.x) + n * p.x_stride.n + c * p.x_stride.c,
      static_cast<T*>(p.y) + n * p.y_stride.n + c * p.y_stride.c, p.x_stride.w, p.y_stride.w, p.x_stride.c,
      p.y_stride.c, valid, p.x_aligned, p.y_aligned, part, member,
      [&](float(&values)[V]) {
        if (p.transform.active) transform(values);
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] *= gate[v];
      },
      [&](const float(&values)[V], bool is_first) {
        if (reduces) sums.add(values, is_first && p.reduction.shifts);
      });
  if (!reduces) return;

  Moments moments[V];
  sums.moments(moments, item_count(p.items, part, member));
  merge_block<V>(moments, reinterpret_cast<Moments*>(shared), lane, items.group, member, items.members);
  if (member == 0) store_moments<V>(p.reduction, moments, n, part, items.parts, c, items.c);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) nchw(const Params p) {
  const Items& items = p.items;
  unsigned char* shared = shared_memory();
  PlaneInfo* planes = reinterpret_cast<PlaneInfo*>(shared);
  const int part = blockIdx.x % items.parts;
  const int plane0 = blockIdx.x / items.parts * items.group, count = min(items.group, items.n * items.c - plane0);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t n = (plane0 + i) / items.c;
    const int c = (plane0 + i) % items.c;
    planes[i] = {n * p.x_stride.n + c * p.x_stride.c, n * p.y_stride.n + c * p.y_stride.c,
                 load_normalize<T>(p.transform, c), p.gate ? load_global(p.gate + plane0 + i) : 1.0f};
  }
  __syncthreads();

  const int member = threadIdx.x % items.members, plane = threadIdx.x / items.members;
  const bool reduces = p.reduction.mean || p.reduction.partials;
  ShiftedSums<1> sums;
  if (plane < count) {
    const PlaneInfo info = planes[plane];
    with_width(items.vector, [&](auto width) {
      constexpr int V = decltype(width)::value;
      if constexpr (V <= kVector<T>) {
        const int64_t x_step = V == 1 ? p.x_stride.w : V, y_step = V == 1 ? p.y_stride.w : V;
        transform_items<V>(
            p, static_cast<const T*>(p.x) + info.x, static_cast<T*>(p.y) + info.y, x_step, y_step, 1, 1, V, true, true,
            part, member,
            [&](float(&values)[V]) {
#pragma unroll
              for (int v = 0; v < V; ++v) values[v] = info.normalize(values[v]);
              if (p.transform.active) activate_all(values, p.transform.activation);
#pragma unroll
              for (int v = 0; v < V; ++v) values[v] *= info.gate;
            },
            [&](const float(&values)[V], bool is_first) {
              if (!reduces) return;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const float value[1] = {values[v]};
                sums.add(value, is_first && v == 0 && p.reduction.shifts);
              }
            });
      }
    });
  }
  if (!reduces) return;

  Moments moments[1];
  sums.moments(moments, plane < count ? item_count(p.items, part, member) * items.vector : 0);
  __syncthreads();  // the planes' memory is reused
  merge_block<1>(moments, reinterpret_cast<Moments*>(shared), plane * items.members, 1, member, items.members);
  if (member == 0 && plane < count) {
    const int n = (plane0 + plane) / items.c;
    store_moments<1>(p.reduction, moments, n, part, items.parts, (plane0 + plane) % items.c, items.c);
  }
}

}  // namespace effk::map_pass
