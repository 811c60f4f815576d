// y = gate * transform(x) and the moments of y.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/moments.cuh"
#include "map_pass/plan.h"
#include "common/transform.cuh"

namespace effk::map_pass {

// The items of one thread. `step` is from item to item in a row, `inner` within an item; `transform` makes y of x.
template <int V, class T, class Function, class Sum>
__device__ __forceinline__ void for_each_item(const Params& p, const T* x, T* y, int64_t x_step, int64_t y_step,
                                              int64_t x_inner, int64_t y_inner, int valid, bool x_aligned,
                                              bool y_aligned, int part, int member, Function transform, Sum sum) {
  constexpr int kBatch = V == 8 ? 2 : 4;  // loads in flight
  const int first = part * p.part_items + member, end = min((part + 1) * p.part_items, p.rows * p.row_items);
  const int step_row = p.members / p.row_items, step_column = p.members % p.row_items;
  int row = first / p.row_items, column = first % p.row_items;
  for (int item = first; item < end; item += kBatch * p.members) {
    Vec<T, V> vec[kBatch];
    T* out[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const bool exists = item + b * p.members < end;
      vec[b] = load_some<V>(x + int64_t{row} * p.x_stride.h + column * x_step, x_inner, exists ? valid : 0, x_aligned);
      out[b] = y + int64_t{row} * p.y_stride.h + column * y_step;
      row += step_row;
      column += step_column;
      if (column >= p.row_items) {
        column -= p.row_items;
        ++row;
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (item + b * p.members >= end) break;
      float values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = to_float(vec[b].at[v]);
      transform(values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        vec[b].at[v] = from_float<T>(values[v]);
        values[v] = to_float(vec[b].at[v]);
      }
      if (p.y) store_some<V>(out[b], vec[b], y_inner, valid, y_aligned);
      sum(values, b == 0 && item == first);
    }
  }
}

// How many items the thread has.
__device__ __forceinline__ int item_count(const Params& p, int part, int member) {
  const int items = min(p.part_items, p.rows * p.row_items - part * p.part_items);
  return (items - member + p.members - 1) / p.members;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) channels_last(const Params p) {
  constexpr int V = kVector<T>;
  unsigned char* shared = shared_memory();
  const int groups = (p.c + p.group - 1) / p.group, lanes = p.group / V;
  const int part = blockIdx.x / groups % p.parts;
  const int64_t n = blockIdx.x / groups / p.parts;
  const int lane = threadIdx.x % lanes * V, member = threadIdx.x / lanes;
  const int c = blockIdx.x % groups * p.group + lane, valid = min(V, p.c - c);

  const ChannelTransform<T, V> transform(p.transform, c, valid);
  float gate[V];
#pragma unroll
  for (int v = 0; v < V; ++v) gate[v] = p.gate && v < valid ? load_global(p.gate + n * p.c + c + v) : 1.0f;
  const bool reduces = p.reduction.mean || p.reduction.partials;
  ShiftedSums<V> sums;
  for_each_item<V>(
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
  sums.moments(moments, item_count(p, part, member));
  merge_block<V>(moments, reinterpret_cast<Moments*>(shared), lane, p.group, member, p.members);
  if (member == 0) store_moments<V>(p.reduction, moments, n, part, p.parts, c, p.c);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) nchw(const Params p) {
  unsigned char* shared = shared_memory();
  PlaneInfo* planes = reinterpret_cast<PlaneInfo*>(shared);
  const int part = blockIdx.x % p.parts;
  const int plane0 = blockIdx.x / p.parts * p.group, count = min(p.group, p.n * p.c - plane0);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t n = (plane0 + i) / p.c;
    const int c = (plane0 + i) % p.c;
    planes[i] = {n * p.x_stride.n + c * p.x_stride.c, n * p.y_stride.n + c * p.y_stride.c,
                 load_normalize<T>(p.transform, c), p.gate ? load_global(p.gate + plane0 + i) : 1.0f};
  }
  __syncthreads();

  const int member = threadIdx.x % p.members, plane = threadIdx.x / p.members;
  const bool reduces = p.reduction.mean || p.reduction.partials;
  ShiftedSums<1> sums;
  if (plane < count) {
    const PlaneInfo info = planes[plane];
    with_width(p.vector, [&](auto width) {
      constexpr int V = decltype(width)::value;
      if constexpr (V <= kVector<T>) {
        const int64_t x_step = V == 1 ? p.x_stride.w : V, y_step = V == 1 ? p.y_stride.w : V;
        for_each_item<V>(
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
  sums.moments(moments, plane < count ? item_count(p, part, member) * p.vector : 0);
  __syncthreads();  // the planes' memory is reused
  merge_block<1>(moments, reinterpret_cast<Moments*>(shared), plane * p.members, 1, member, p.members);
  if (member == 0 && plane < count) {
    const int n = (plane0 + plane) / p.c;
    store_moments<1>(p.reduction, moments, n, part, p.parts, (plane0 + plane) % p.c, p.c);
  }
}

}  // namespace effk::map_pass
