// Depthwise convolution with a transform of its input and of its output, and moments of what it stores.
//
// A block stages an input tile in shared memory, where each element is transformed once. A thread owns a column of
// kRows outputs: it slides down the tile, reading each window row once, weights in registers.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/moments.cuh"
#include "common/transform.cuh"
#include "dwconv/plan.h"

namespace effk::dwconv {

// Staged columns lie in this order: with stride 2 the even ones, then the odd ones, so that neighbouring threads read
// neighbouring columns.
template <int S>
__device__ __forceinline__ int slot(int column, int odd_offset) {
  static_assert(S == 1 || S == 2, "stride");
  return S == 1 ? column : (column & 1) * odd_offset + (column >> 1);
}

// The outputs of one thread for V channels: `read(row, kx, values)` gives the V inputs of a window, `finish(row, sums)`
// takes the sums of output row `row`.
template <int K, int S, int V, class Read, class Finish>
__device__ __forceinline__ void slide(const float (&weight)[K * K][V], Read read, Finish finish) {
  float sums[kRows][V];
#pragma unroll
  for (int i = 0; i < (kRows - 1) * S + K; ++i) {
    float in[K][V];
#pragma unroll
    for (int kx = 0; kx < K; ++kx) read(i, kx, in[kx]);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int ky = i - row * S;
      if (ky < 0 || ky >= K) continue;
#pragma unroll
      for (int kx = 0; kx < K; ++kx)
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float so_far = ky == 0 && kx == 0 ? 0.0f : sums[row][v];
          sums[row][v] = fmaf(in[kx][v], weight[ky * K + kx][v], so_far);
        }
      if (ky == K - 1) finish(row, sums[row]);
    }
  }
}

template <class T, int K, int S>
__global__ void __launch_bounds__(kMaxThreads, K < 7 ? 2 : 1) channels_last(const Params p) {
  constexpr int V = lanes(K), kLoad = kVector<T>;
  static_assert(kLoad % V == 0, "a thread stages whole lanes");
  extern __shared__ __align__(16) unsigned char shared[];
  T* tile = reinterpret_cast<T*>(shared);
  float* weights = reinterpret_cast<float*>(shared + p.weight_offset);
  const int tid = threadIdx.x, threads = blockDim.x;

  const int groups = (p.c + p.group - 1) / p.group;
  const int c0 = blockIdx.x % groups * p.group;
  int rest = blockIdx.x / groups;
  const int tile_x = rest % p.tiles_w;
  rest /= p.tiles_w;
  const int tile_y = rest % p.tiles_h;
  const int64_t n = rest / p.tiles_h;
  const int out_x0 = tile_x * p.tile_w, out_y0 = tile_y * p.strips * kRows;
  const int rows = (p.strips * kRows - 1) * S + K, columns = (p.tile_w - 1) * S + K;
  const int odd_offset = (columns + 1) / 2;

  for (int i = tid; i < p.group * K * K; i += threads) {
    const int c = i / (K * K), tap = i % (K * K);
    const T* from = static_cast<const T*>(p.weight) + (c0 + c) * p.weight_stride[0] + tap / K * p.weight_stride[1] +
                    tap % K * p.weight_stride[2];
    weights[tap * p.weight_pitch + c] = c0 + c < p.c ? to_float(load_global(from)) : 0.0f;
  }

  {
    // A thread's channels stay, its pixel moves on by `step`: the block has a whole number of threads per pixel.
    const int vectors = p.group / kLoad;
    const int c = tid % vectors * kLoad, step = threads / vectors;
    const int step_row = step / columns, step_column = step % columns;
    int column = tid / vectors % columns, row = tid / vectors / columns;
    const int valid = min(kLoad, p.c - c0 - c);
    const T* x = static_cast<const T*>(p.x) + n * p.x_stride.n + (c0 + c) * p.x_stride.c;
    const int x0 = out_x0 * S - p.pad_left, y0 = out_y0 * S - p.pad_top;
    const ChannelTransform<T, kLoad> transform(p.prologue, c0 + c, valid);
    constexpr int kBatch = 4;  // loads in flight
    while (row < rows) {
      Vec<T, kLoad> vec[kBatch];
      int at[kBatch];
      bool inside[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int y = y0 + row, x_ = x0 + column;
        inside[b] = row < rows && y >= 0 && y < p.h && x_ >= 0 && x_ < p.w;
        at[b] = row < rows ? (row * columns + slot<S>(column, odd_offset)) * p.group + c : -1;
        vec[b] = load_some<kLoad>(x + int64_t{y} * p.x_stride.h + int64_t{x_} * p.x_stride.w, p.x_stride.c,
                                  inside[b] ? valid : 0, p.x_vector == kLoad);
        column += step_column;
        row += step_row;
        if (column >= columns) {
          column -= columns;
          ++row;
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (p.prologue.active && inside[b]) {
#pragma unroll
          for (int v = 0; v < kLoad; ++v) vec[b].at[v] = from_float<T>(transform(to_float(vec[b].at[v]), v));
        }
        if (at[b] >= 0) vec[b].store(tile + at[b]);
      }
    }
  }
  __syncthreads();

  const int per_pixel = p.group / V;
  const int lane = tid % per_pixel * V, column = tid / per_pixel % p.tile_w, strip = tid / per_pixel / p.tile_w;
  const int c = c0 + lane, valid = min(V, p.c - c);
  const int out_x = out_x0 + column, out_y = out_y0 + strip * kRows;
  ShiftedSums<V> sums;
  {
    float weight[K * K][V];
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const auto vec = Vec<float, V>::load(weights + tap * p.weight_pitch + lane);
#pragma unroll
      for (int v = 0; v < V; ++v) weight[tap][v] = vec.at[v];
    }
    const ChannelTransform<T, V> transform(p.epilogue, c, valid);
    const T* in = tile + (strip * kRows * S * columns + column) * p.group + lane;
    T* out = static_cast<T*>(p.y) + n * p.y_stride.n + c * p.y_stride.c + int64_t{out_y} * p.y_stride.h +
             int64_t{out_x} * p.y_stride.w;
    slide<K, S, V>(
        weight,
        [&](int row, int kx, float(&values)[V]) {
          const auto vec = Vec<T, V>::load(in + (row * columns + slot<S>(kx, odd_offset)) * p.group);
#pragma unroll
          for (int v = 0; v < V; ++v) values[v] = to_float(vec.at[v]);
        },
        [&](int row, float(&values)[V]) {
          Vec<T, V> vec;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            vec.at[v] = from_float<T>(transform(values[v], v));
            values[v] = to_float(vec.at[v]);
          }
          if (out_y + row >= p.out_h || out_x >= p.out_w) return;
          store_some<V>(out + int64_t{row} * p.y_stride.h, vec, p.y_stride.c, valid, p.y_vector);
          if (p.reduction.mean || p.reduction.partials) sums.add(values);
        });
  }

  if (p.reduction.mean || p.reduction.partials) {
    Moments moments[V];
    sums.moments(moments);
    __syncthreads();  // the tile's memory is reused
    merge_block<V>(moments, reinterpret_cast<Moments*>(shared), lane, p.group, tid / per_pixel, p.tile_w * p.strips);
    if (tid < per_pixel)
      store_moments<V>(p.reduction, moments, n, tile_y * p.tiles_w + tile_x, p.tiles_h * p.tiles_w, c, p.c);
  }
}

// Stages the tiles of all planes, V columns per load: those from an aligned column `lead` before the first one needed.
template <class T, int S, int V>
__device__ __forceinline__ void stage_nchw(const Params& p, const PlaneInfo* planes, int count, float* tile, int rows,
                                           int columns, int x0, int y0, int lead) {
  const int threads = blockDim.x;
  const int vectors = (lead + columns + V - 1) / V, half = p.pitch / 2;
  int vector = threadIdx.x % vectors, row = threadIdx.x / vectors % rows, plane = threadIdx.x / vectors / rows;
  const int step_vector = threads % vectors, step_row = threads / vectors % rows, step_plane = threads / vectors / rows;
  constexpr int kBatch = 4;  // loads in flight
  while (plane < count) {
    Vec<T, V> vec[kBatch];
    int at[kBatch], from_plane[kBatch];
    bool inside[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int y = y0 + row, x = x0 - lead + vector * V;
      // Vectors are whole: the width and all strides are multiples of V.
      inside[b] = plane < count && y >= 0 && y < p.h && x >= 0 && x < p.w;
      at[b] = plane < count ? plane * p.plane_pitch + row * p.pitch + vector * V / S : -1;
      from_plane[b] = plane;
#pragma unroll
      for (int v = 0; v < V; ++v) vec[b].at[v] = from_float<T>(0.0f);
      if (inside[b]) {
        const int64_t offset = planes[plane].x + int64_t{y} * p.x_stride.h + int64_t{x} * p.x_stride.w;
        vec[b] = Vec<T, V>::load_global(static_cast<const T*>(p.x) + offset);
      }
      if (V == 1 && S == 2 && at[b] >= 0) at[b] += (vector & 1) * half;
      vector += step_vector;
      row += step_row;
      plane += step_plane;
      if (vector >= vectors) {
        vector -= vectors;
        ++row;
      }
      if (row >= rows) {
        row -= rows;
        ++plane;
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (at[b] < 0) continue;
      float values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = to_float(vec[b].at[v]);
      if (p.prologue.active && inside[b]) {
        const Normalize normalize = planes[from_plane[b]].prologue;
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = activate(normalize(values[v]), p.prologue.activation);
      }
      constexpr int kRun = V > S ? V / S : 1, kStore = kRun > 4 ? 4 : kRun;  // neighbours in shared memory
#pragma unroll
      for (int first = 0; first < V; first += kStore) {
        // Of the even columns, then of the odd ones, if they lie apart.
        Vec<float, kStore> run;
#pragma unroll
        for (int v = 0; v < kStore; ++v) run.at[v] = values[first % kRun * S + v * S + first / kRun];
        run.store(tile + at[b] + first % kRun + first / kRun * half);
      }
    }
  }
}

template <class T, int K, int S>
__global__ void __launch_bounds__(kMaxThreads, K < 7 ? 2 : 1) nchw(const Params p) {
  extern __shared__ __align__(16) unsigned char shared[];
  PlaneInfo* planes = reinterpret_cast<PlaneInfo*>(shared);
  float* weights = reinterpret_cast<float*>(shared + p.weight_offset);
  float* tile = reinterpret_cast<float*>(shared + p.tile_offset);
  const int tid = threadIdx.x, threads = blockDim.x;

  const int tiles = p.tiles_h * p.tiles_w;
  const int tile_index = blockIdx.x % tiles;
  const int out_x0 = tile_index % p.tiles_w * p.tile_w, out_y0 = tile_index / p.tiles_w * p.strips * kRows;
  const int64_t plane0 = int64_t{blockIdx.x / tiles} * p.group;
  const int count = int(min(int64_t{p.group}, int64_t{p.n} * p.c - plane0));

  for (int i = tid; i < count; i += threads) {
    const int64_t n = (plane0 + i) / p.c;
    const int c = int((plane0 + i) % p.c);
    planes[i] = {n * p.x_stride.n + c * p.x_stride.c, n * p.y_stride.n + c * p.y_stride.c,
                 load_normalize<T>(p.prologue, c), load_normalize<T>(p.epilogue, c)};
  }
  for (int i = tid; i < count * K * K; i += threads) {
    const int c = int((plane0 + i / (K * K)) % p.c), tap = i % (K * K);
    weights[i] = to_float(load_global(static_cast<const T*>(p.weight) + c * p.weight_stride[0] +
                                      tap / K * p.weight_stride[1] + tap % K * p.weight_stride[2]));
  }
  __syncthreads();

  const int x0 = out_x0 * S - p.pad_left, y0 = out_y0 * S - p.pad_top;
  const int rows = (p.strips * kRows - 1) * S + K, columns = (p.tile_w - 1) * S + K;
  const int lead = (x0 % p.x_vector + p.x_vector) % p.x_vector;
  with_width(p.x_vector, [&](auto width) {
    constexpr int V = decltype(width)::value;
    if constexpr (V <= kVector<T>) stage_nchw<T, S, V>(p, planes, count, tile, rows, columns, x0, y0, lead);
  });
  __syncthreads();

  const int column = tid % p.tile_w, plane = tid / p.tile_w % p.group, strip = tid / p.tile_w / p.group;
  const int out_x = out_x0 + column, out_y = out_y0 + strip * kRows;
  const bool reduces = p.reduction.mean || p.reduction.partials;
  ShiftedSums<1> sums;
  if (plane < count) {
    float weight[K * K][1];
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) weight[tap][0] = weights[plane * K * K + tap];
    const Normalize normalize = planes[plane].epilogue;
    // Window column kx lies at in[kx & 1][kx >> 1] if columns are split by parity: `lead` may swap the halves.
    const int half = p.pitch / 2;
    const float* first = tile + plane * p.plane_pitch + strip * kRows * S * p.pitch + column;
    const float* in[2] = {first + slot<S>(lead, half), first + slot<S>(lead + 1, half)};
    T* out = static_cast<T*>(p.y) + planes[plane].y + int64_t{out_y} * p.y_stride.h + int64_t{out_x} * p.y_stride.w;
    slide<K, S, 1>(
        weight,
        [&](int row, int kx, float(&values)[1]) {
          values[0] = S == 1 ? in[0][row * p.pitch + kx] : in[kx & 1][row * p.pitch + (kx >> 1)];
        },
        [&](int row, float(&values)[1]) {
          const T stored = from_float<T>(activate(normalize(values[0]), p.epilogue.activation));
          if (out_y + row >= p.out_h || out_x >= p.out_w) return;
          out[int64_t{row} * p.y_stride.h] = stored;
          values[0] = to_float(stored);
          if (reduces) sums.add(values);
        });
  }

  if (reduces) {
    Moments moments[1];
    sums.moments(moments);
    __syncthreads();  // the tile's memory is reused
    const int members = p.tile_w * p.strips, member = strip * p.tile_w + column;
    merge_block<1>(moments, reinterpret_cast<Moments*>(shared), plane * members, 1, member, members);
    if (member == 0 && plane < count) {
      const int64_t n = (plane0 + plane) / p.c;
      store_moments<1>(p.reduction, moments, n, tile_index, tiles, int((plane0 + plane) % p.c), p.c);
    }
  }
}

}  // namespace effk::dwconv
