// dz = (grad * scale + shift) * act'(bn(x)), and of it either the sums of dz and of dz * xhat, or the gradient of x.
#pragma once

#include "batch_norm/plan.h"
#include "common/cuda_vec.cuh"
#include "common/partial_sums.cuh"
#include "common/transform.cuh"
#include "map_pass/kernel.cuh"

namespace effk::batch_norm {

// The items of one thread, of the channels `of`, or all of one. `step` is from item to item in a row, `inner` within an
// item, for each map.
struct Steps {
  int64_t grad, x, grad_x;
};

template <int V, int kOf, class T>
__device__ __forceinline__ void backward_items(const Params& p, const T* grad, const T* x, T* grad_x, const Steps& step,
                                               const Steps& inner, int valid, int part, int member,
                                               const ChannelBackward (&of)[kOf], float (&sums)[2][kOf]) {
  constexpr int kBatch = V < 4 ? 4 : 2;
  Vec<T, V> grads[kBatch], raw[kBatch];
  T* out[kBatch];
  map_pass::for_each_item<kBatch>(
      p.items, part, member,
      [&](int i, int row, int column, bool exists) {
        grads[i] = load_some<V>(grad + int64_t{row} * p.grad_stride.h + column * step.grad, inner.grad,
                                exists ? valid : 0, p.grad_aligned);
        raw[i] = load_some<V>(x + int64_t{row} * p.x_stride.h + column * step.x, inner.x, exists ? valid : 0,
                              p.x_aligned);
        out[i] = grad_x + int64_t{row} * p.grad_x_stride.h + column * step.grad_x;
      },
      [&](int i, bool) {
        float dz[V], values[V];
        to_floats(dz, grads[i]);
        to_floats(values, raw[i]);
        norm_gradient(dz, values, p.transform.forward.activation, of);
        if (!p.grad_x) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            float& sum = sums[1][v % kOf];
            sums[0][v % kOf] += dz[v];
            sum = fmaf(dz[v], values[v] - of[v % kOf].normalize.mean, sum);
          }
          return;
        }
        input_gradient(dz, values, of);
#pragma unroll
        for (int v = 0; v < V; ++v) grads[i].at[v] = from_float<T>(dz[v]);
        store_some<V>(out[i], grads[i], inner.grad_x, valid, p.grad_x_aligned);
      });
}

// Leaves a block's sum of channel c over one part of image n.
template <class T>
__device__ __forceinline__ void leave(const Params& p, int sum, int64_t n, int part, int c, float total) {
  if (sum == 1) total *= load_inverse_deviation<T>(p.transform.forward, c);
  p.sums.second[(n * p.items.parts + part) * p.sums.pitch + p.sums.split + int64_t{sum} * p.items.c + c] = total;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) channels_last(const Params p) {
  constexpr int V = kChannels;
  const Items& items = p.items;
  const int groups = (items.c + items.group - 1) / items.group, lanes = items.group / V;
  const int part = blockIdx.x / groups % items.parts;
  const int64_t n = blockIdx.x / groups / items.parts;
  const int lane = threadIdx.x % lanes * V, member = threadIdx.x / lanes;
  const int c0 = blockIdx.x % groups * items.group, c = c0 + lane, valid = min(V, items.c - c);

  ChannelBackward channel[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v >= valid) continue;
    channel[v] = load_backward<T>(p.transform, c + v, items.c);
    set_image(channel[v], p.transform, n, c + v, items.c);
  }
  float sums[2][V] = {};
  const auto start = [&](const void* map, const Strides& stride) {
    return static_cast<const T*>(map) + n * stride.n + c * stride.c;
  };
  backward_items<V>(p, start(p.grad, p.grad_stride), start(p.x, p.x_stride),
                    const_cast<T*>(start(p.grad_x, p.grad_x_stride)),
                    {p.grad_stride.w, p.x_stride.w, p.grad_x_stride.w},
                    {p.grad_stride.c, p.x_stride.c, p.grad_x_stride.c}, valid, part, member, channel, sums);
  if (p.grad_x) return;
  add_members<1>(sums, reinterpret_cast<float*>(shared_memory()), lane, items.group, member, items.members,
                 [&](int sum, int i, float total) {
                   if (c0 + i < items.c) leave<T>(p, sum, n, part, c0 + i, total);
                 });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 2) nchw(const Params p) {
  const Items& items = p.items;
  const int part = blockIdx.x % items.parts, plane0 = blockIdx.x / items.parts * items.group;
  const int member = threadIdx.x % items.members, lane = threadIdx.x / items.members, plane = plane0 + lane;
  float sums[2][1] = {};
  if (plane < items.n * items.c) {
    const int64_t n = plane / items.c;
    const int c = plane % items.c;
    ChannelBackward channel[1] = {load_backward<T>(p.transform, c, items.c)};
    set_image(channel[0], p.transform, n, c, items.c);
    const auto start = [&](const void* map, const Strides& stride) {
      return static_cast<const T*>(map) + n * stride.n + c * stride.c;
    };
    with_width(items.vector, [&](auto width) {
      constexpr int V = decltype(width)::value;
      if constexpr (V <= kVector<T>) {
        const auto step = [](const Strides& stride) { return V == 1 ? int64_t{stride.w} : V; };
        backward_items<V>(p, start(p.grad, p.grad_stride), start(p.x, p.x_stride),
                          const_cast<T*>(start(p.grad_x, p.grad_x_stride)),
                          {step(p.grad_stride), step(p.x_stride), step(p.grad_x_stride)}, {1, 1, 1}, V, part, member,
                          channel, sums);
      }
    });
  }
  if (p.grad_x) return;
  add_members<1>(sums, reinterpret_cast<float*>(shared_memory()), lane, items.group, member, items.members,
                 [&](int sum, int i, float total) {
                   const int from = plane0 + i;
                   if (from < items.n * items.c) leave<T>(p, sum, from / items.c, part, from % items.c, total);
                 });
}

}  // namespace effk::batch_norm
