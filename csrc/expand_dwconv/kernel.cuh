// The 1x1 expansion and the depthwise convolution in one kernel: the expanded map is never in global memory.
//
// A block has x under one output tile in shared memory. A group of channels at a time, it expands that on matrix
// instructions, normalises and activates it into shared memory, and convolves it from there as dwconv does.
#pragma once

#include "common/moments.cuh"
#include "common/transform.cuh"
#include "dwconv/kernel.cuh"
#include "expand_dwconv/expand.cuh"
#include "expand_dwconv/plan.h"

namespace effk::expand_dwconv {

using dwconv::slot;
using dwconv::Window;

template <class T>
__device__ __forceinline__ Folded load_folded(const Transform& t, int c) {
  const Normalize n = load_normalize<T>(t, c);
  return {n.scale, n.beta - n.mean * n.scale};
}

template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(K)) kernel(const Params p) {
  constexpr int V = lanes(K);
  unsigned char* shared = shared_memory();
  T* x_tile = reinterpret_cast<T*>(shared);
  T* expand = reinterpret_cast<T*>(shared + p.expand_offset);
  T* e_tile = reinterpret_cast<T*>(shared + p.e_offset);
  Folded* norm1 = reinterpret_cast<Folded*>(shared + p.norm_offset);
  Folded* norm2 = norm1 + p.group;
  float* weights = reinterpret_cast<float*>(shared + p.weight_offset);
  float* column_sums = reinterpret_cast<float*>(shared + p.sum_offset);
  const int tid = threadIdx.x;

  // Blocks that share a tile of x run together.
  const int shares = (p.groups + p.groups_each - 1) / p.groups_each;
  const int first_group = blockIdx.x % shares * p.groups_each, end_group = min(first_group + p.groups_each, p.groups);
  int rest = blockIdx.x / shares;
  const int tile_x = rest % p.tiles_w;
  rest /= p.tiles_w;
  const int tile_y = rest % p.tiles_h;
  const int64_t n = rest / p.tiles_h;
  const int out_x0 = tile_x * p.tile_w, out_y0 = tile_y * p.strips * kRows;
  const int rows = (p.strips * kRows - 1) * S + K, columns = (p.tile_w - 1) * S + K;
  const int odd_offset = (columns + 1) / 2;
  const int x0 = out_x0 * S - p.pad_left, y0 = out_y0 * S - p.pad_top;
  const Window inside(x0, y0, columns, rows, p.w, p.h);
  const int pixels = inside.width * inside.height;

  const auto stage_expand = [&](int group) {
    stage_weights(expand, p.operands, group * p.group, p.group, p.hidden, kThreads);
  };
  stage_pixels(x_tile, p.operands, inside, n, x0, y0, kThreads);
  stage_expand(first_group);
  // Around the map e is zero, and stays so.
  if (inside.width < columns || inside.height < rows)
    clear_shared(e_tile, rows * columns * p.e_pitch * int(sizeof(T)));

  for (int group = first_group; group < end_group; ++group) {
    const int c0 = group * p.group;
    for (int i = tid; i < 2 * p.group; i += kThreads) {  // norm2 follows norm1
      const bool second = i >= p.group;
      const int c = c0 + i - second * p.group;
      if (c < p.hidden) norm1[i] = load_folded<T>(second ? p.norm2 : p.norm1, c);
    }
    wait_for_copies();
    __syncthreads();

    // The second norm's scale goes into the depthwise weights.
    for (int i = tid; i < p.group * K * K; i += kThreads) {
      const int c = i / (K * K), tap = i % (K * K);
      if (c0 + c >= p.hidden) break;
      const T* from = static_cast<const T*>(p.depthwise) + int64_t{c0} * (K * K) + i;
      weights[tap * p.weight_pitch + c] = to_float(load_global(from)) * norm2[c].scale;
    }
    using Product = UnitProduct<T>;
    multiply_pixels(x_tile, expand, p.operands, pixels, p.group, kThreads, p.tf32, [&](const Product& product,
                                                                                       int pixel0, int channel0) {
      constexpr int kValues = 2 * Product::kLaneColumns;
      Folded norm[kValues];
#pragma unroll
      for (int v = 0; v < kValues; ++v) norm[v] = norm1[channel0 + product.column(v / 2) + v % 2];
#pragma unroll
      for (int i = 0; i < Product::kLaneRows; ++i) {
        const int pixel = pixel0 + product.row(i);
        if (pixel >= pixels) break;
        float values[kValues];
#pragma unroll
        for (int v = 0; v < kValues; ++v)
          values[v] = fmaf(product.pair(i, v / 2).at[v % 2], norm[v].scale, norm[v].shift);
        activate_all(values, p.norm1.activation);
        const int row = small_quotient(pixel, inside.width), column = pixel - row * inside.width;
        const int at = (inside.top + row) * columns + slot<S>(inside.left + column, odd_offset);
        T* to = e_tile + at * p.e_pitch + channel0;
#pragma unroll
        for (int j = 0; j < Product::kLaneColumns; ++j)
          Vec<T, 2>{{from_float<T>(values[2 * j]), from_float<T>(values[2 * j + 1])}}.store(to + product.column(j));
      }
    });
    __syncthreads();

    if (group + 1 < end_group) stage_expand(group + 1);
    const int per_pixel = p.group / V;
    const int member = small_quotient(tid, per_pixel), strip = small_quotient(member, p.tile_w);
    const int lane = (tid - member * per_pixel) * V, column = member - strip * p.tile_w;
    const int c = c0 + lane, valid = min(V, p.hidden - c);
    const int out_x = out_x0 + column, out_y = out_y0 + strip * kRows;
    const int count = out_x < p.out_w ? min(kRows, p.out_h - out_y) : 0;  // rows of this thread; none if negative
    const bool reduces = p.reduction.mean || p.reduction.partials;
    ShiftedSums<V> sums;
    if (strip < p.strips) {
      float weight[K * K][V];
#pragma unroll
      for (int tap = 0; tap < K * K; ++tap) {
        const auto vec = Vec<float, V>::load(weights + tap * p.weight_pitch + lane);
#pragma unroll
        for (int v = 0; v < V; ++v) weight[tap][v] = vec.at[v];
      }
      float shift[V];
#pragma unroll
      for (int v = 0; v < V; ++v) shift[v] = norm2[lane + v].shift;
      const T* in = e_tile + (strip * kRows * S * columns + column) * p.e_pitch + lane;
      const int row_pitch = columns * p.e_pitch;
      T* out = static_cast<T*>(p.d) + n * p.d_stride.n + c + int64_t{out_y} * p.d_stride.h +
               int64_t{out_x} * p.d_stride.w;
      dwconv::slide<K, S, V>(
          weight,
          [&](int row, int kx, float(&values)[V]) {
            const auto vec = Vec<T, V>::load(in + row * row_pitch + slot<S>(kx, odd_offset) * p.e_pitch);
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] = to_float(vec.at[v]);
          },
          [&](int row, float(&values)[V]) {
            if (row >= count) return;
#pragma unroll
            for (int v = 0; v < V; ++v) values[v] += shift[v];
            activate_all(values, p.norm2.activation);
            Vec<T, V> vec;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              vec.at[v] = from_float<T>(values[v]);
              values[v] = to_float(vec.at[v]);
            }
            store_some<V>(out, vec, 1, valid, p.d_vector);
            out += p.d_stride.h;
            if (reduces) sums.add(values, row == 0 && p.reduction.shifts);
          });
      if (reduces && !p.reduction.shifts) {
#pragma unroll
        for (int v = 0; v < V; ++v) column_sums[member * p.group + lane + v] = sums.sum[v];
      }
    }
    __syncthreads();

    if (!reduces) continue;
    const int members = p.strips * p.tile_w, part = tile_y * p.tiles_w + tile_x, parts = p.tiles_h * p.tiles_w;
    if (p.reduction.shifts) {
      Moments moments[V];
      sums.moments(moments, max(count, 0));
      merge_block<V>(moments, reinterpret_cast<Moments*>(shared + p.sum_offset), lane, p.group, member, members);
      if (member == 0) store_moments<V>(p.reduction, moments, n, part, parts, c, p.hidden);
      continue;
    }
    const int area = min(p.tile_w, p.out_w - out_x0) * min(p.strips * kRows, p.out_h - out_y0);
    for (int i = tid; i < p.group; i += kThreads) {
      float sum = 0;
      for (int other = 0; other < members; ++other) sum += column_sums[other * p.group + i];
      const Moments moments[1] = {{static_cast<float>(area), 0.0f, sum / area, 0.0f}};
      store_moments<1>(p.reduction, moments, n, part, parts, c0 + i, p.hidden);
    }
  }
}

}  // namespace effk::expand_dwconv
