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

// The part of a tile's input that lies on the map. Around it the tile is zero.
struct Window {
  int left, top, width, height;

  __device__ __forceinline__ Window(int x0, int y0, int columns, int rows, int w, int h)
      : left(min(max(-x0, 0), columns)),
        top(min(max(-y0, 0), rows)),
        width(max(min(columns, w - x0) - left, 0)),
        height(max(min(rows, h - y0) - top, 0)) {
    if (width == 0) height = 0;
  }
};

// A thread's way through a window, row by row, `step` columns at a time.
struct Walk {
  int row, column;

  __device__ __forceinline__ Walk(const Window& window, int start, int step)
      : width_(max(window.width, 1)),
        step_row_(small_quotient(step, width_)),
        step_column_(step - step_row_ * width_) {
    row = small_quotient(start, width_);
    column = start - row * width_;
  }

  __device__ __forceinline__ void next() {
    row += step_row_;
    column += step_column_;
    if (column >= width_) {
      column -= width_;
      ++row;
    }
  }

 private:
  int width_, step_row_, step_column_;
};

template <class T, int K, int S>
__global__ void __launch_bounds__(kMaxThreads, K < 7 ? 2 : 1) channels_last(const Params p) {
  constexpr int V = lanes(K), kLoad = kVector<T>;
  static_assert(kLoad % V == 0, "a thread stages whole lanes");
  unsigned char* shared = shared_memory();
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
    const T* from = static_cast<const T*>(p.weight) + int64_t{c0} * (K * K) + i;
    weights[tap * p.weight_pitch + c] = c0 + c < p.c ? to_float(load_global(from)) : 0.0f;
  }

  const int x0 = out_x0 * S - p.pad_left, y0 = out_y0 * S - p.pad_top;
  const Window inside(x0, y0, columns, rows, p.w, p.h);
  if (inside.width < columns || inside.height < rows) {
    clear_shared(tile, rows * columns * p.group * int(sizeof(T)));
    __syncthreads();
  }
  {
    // A thread keeps its channels: a whole number of pixels is loaded at a time.
    const int vectors = p.group / kLoad, pixel = small_quotient(tid, vectors), lane = (tid - pixel * vectors) * kLoad;
    const int c = c0 + lane, valid = min(kLoad, p.c - c);
    const ChannelTransform<T, kLoad> transform(p.prologue, c, valid);
    const T* x = static_cast<const T*>(p.x) + n * p.x_stride.n + c * p.x_stride.c +
                 int64_t{y0 + inside.top} * p.x_stride.h + int64_t{x0 + inside.left} * p.x_stride.w;
    T* to = tile + lane;
    constexpr int kBatch = 4;  // loads in flight
    Walk walk(inside, pixel, small_quotient(threads, vectors));
    while (walk.row < inside.height) {
      Vec<T, kLoad> vec[kBatch];
      int at[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool exists = walk.row < inside.height;
        vec[b] = load_some<kLoad>(x + int64_t{walk.row} * p.x_stride.h + int64_t{walk.column} * p.x_stride.w,
                                  p.x_stride.c, exists ? valid : 0, p.x_vector == kLoad);
        at[b] = (inside.top + walk.row) * columns + slot<S>(inside.left + walk.column, odd_offset);
        if (!exists) at[b] = -1;
        walk.next();
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (at[b] < 0) break;
        if (p.prologue.active) {
          float values[kLoad];
#pragma unroll
          for (int v = 0; v < kLoad; ++v) values[v] = to_float(vec[b].at[v]);
          transform(values);
#pragma unroll
          for (int v = 0; v < kLoad; ++v) vec[b].at[v] = from_float<T>(values[v]);
        }
        vec[b].store(to + at[b] * p.group);
      }
    }
  }
  __syncthreads();

  const int per_pixel = p.group / V;
  const int member = small_quotient(tid, per_pixel), strip = small_quotient(member, p.tile_w);
  const int lane = (tid - member * per_pixel) * V, column = member - strip * p.tile_w;
  const int c = c0 + lane, valid = min(V, p.c - c);
  const int out_x = out_x0 + column, out_y = out_y0 + strip * kRows;
  const int count = out_x < p.out_w ? min(kRows, p.out_h - out_y) : 0;  // rows of this thread; none if negative
  const bool reduces = p.reduction.mean || p.reduction.partials;
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
          if (row >= count) return;
          transform(values);
          Vec<T, V> vec;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            vec.at[v] = from_float<T>(values[v]);
            values[v] = to_float(vec.at[v]);
          }
          store_some<V>(out, vec, p.y_stride.c, valid, p.y_vector);
          out += p.y_stride.h;
          if (reduces) sums.add(values, row == 0 && p.reduction.shifts);
        });
  }

  if (reduces) {
    Moments moments[V];
    sums.moments(moments, max(count, 0));
    __syncthreads();  // the tile's memory is reused
    merge_block<V>(moments, reinterpret_cast<Moments*>(shared), lane, p.group, member, p.tile_w * p.strips);
    if (member == 0)
      store_moments<V>(p.reduction, moments, n, tile_y * p.tiles_w + tile_x, p.tiles_h * p.tiles_w, c, p.c);
  }
}

// Stages the tiles of `count` planes, V columns per load: `inside` counts its columns in such vectors, of which the
// first begins at column x0 of the map.
template <class T, int S, int V>
__device__ __forceinline__ void stage_nchw(const Params& p, const PlaneInfo* planes, int count, float* tile,
                                           const Window& inside, int x0, int y0) {
  const int half = p.pitch / 2;
  const int area = max(inside.width * inside.height, 1), step = blockDim.x;
  const int step_plane = small_quotient(step, area);
  int plane = small_quotient(threadIdx.x, area);
  Walk walk(inside, threadIdx.x - plane * area, step - step_plane * area);
  if (inside.height == 0) plane = count;
  const T* x = static_cast<const T*>(p.x) + int64_t{y0 + inside.top} * p.x_stride.h +
               int64_t{x0 + inside.left * V} * p.x_stride.w;
  constexpr int kBatch = 4;  // loads in flight
  while (plane < count) {
    Vec<T, V> vec[kBatch];
    int at[kBatch], from_plane[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      from_plane[b] = plane;
      at[b] = plane * p.plane_pitch + (inside.top + walk.row) * p.pitch;
      const int column = inside.left + walk.column;
      at[b] += V == 1 ? slot<S>(column, half) : column * (V / S);
      if (plane < count)
        vec[b] = Vec<T, V>::load_global(x + planes[plane].x + int64_t{walk.row} * p.x_stride.h +
                                        int64_t{walk.column * V} * p.x_stride.w);
      walk.next();
      plane += step_plane;
      if (walk.row >= inside.height) {
        walk.row -= inside.height;
        ++plane;
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (from_plane[b] >= count) break;
      float values[V];
#pragma unroll
      for (int v = 0; v < V; ++v) values[v] = to_float(vec[b].at[v]);
      if (p.prologue.active) {
        const Normalize normalize = planes[from_plane[b]].prologue;
#pragma unroll
        for (int v = 0; v < V; ++v) values[v] = normalize(values[v]);
        activate_all(values, p.prologue.activation);
      }
      constexpr int kRun = V > S ? V / S : 1, kStore = kRun > 4 ? 4 : kRun;  // neighbours in shared memory
#pragma unroll
      for (int first = 0; first < V; first += kStore) {
        // Of the even columns, then of the odd ones, if they lie apart.
        Vec<float, kStore> run;
#pragma unroll
        for (int v = 0; v < kStore; ++v) run.at[v] = values[(first % kRun + v) * (V > 1 ? S : 1) + first / kRun];
        run.store(tile + at[b] + first % kRun + first / kRun * half);
      }
    }
  }
}

template <class T, int K, int S>
__global__ void __launch_bounds__(kMaxThreads, K < 7 ? 2 : 1) nchw(const Params p) {
  unsigned char* shared = shared_memory();
  PlaneInfo* planes = reinterpret_cast<PlaneInfo*>(shared);
  float* weights = reinterpret_cast<float*>(shared + p.weight_offset);
  float* tile = reinterpret_cast<float*>(shared + p.tile_offset);
  const int tid = threadIdx.x, threads = blockDim.x;

  const int tiles = p.tiles_h * p.tiles_w;
  const int tile_index = blockIdx.x % tiles;
  const int out_x0 = tile_index % p.tiles_w * p.tile_w, out_y0 = tile_index / p.tiles_w * p.strips * kRows;
  const int plane0 = blockIdx.x / tiles * p.group, count = min(p.group, p.n * p.c - plane0);

  for (int i = tid; i < count; i += threads) {
    const int64_t n = (plane0 + i) / p.c;
    const int c = (plane0 + i) % p.c;
    planes[i] = {n * p.x_stride.n + c * p.x_stride.c, n * p.y_stride.n + c * p.y_stride.c,
                 load_normalize<T>(p.prologue, c), load_normalize<T>(p.epilogue, c)};
  }
  for (int i = tid; i < count * K * K; i += threads) {
    const int64_t c = (plane0 + i / (K * K)) % p.c;
    weights[i] = to_float(load_global(static_cast<const T*>(p.weight) + c * (K * K) + i % (K * K)));
  }
  const int x0 = out_x0 * S - p.pad_left, y0 = out_y0 * S - p.pad_top;
  const int rows = (p.strips * kRows - 1) * S + K, columns = (p.tile_w - 1) * S + K;
  const int lead = (x0 % p.x_vector + p.x_vector) % p.x_vector;
  if (x0 < 0 || y0 < 0 || x0 + columns > p.w || y0 + rows > p.h)
    clear_shared(tile, count * p.plane_pitch * int(sizeof(float)));
  __syncthreads();
  with_width(p.x_vector, [&](auto width) {
    constexpr int V = decltype(width)::value;
    if constexpr (V <= kVector<T>) {
      // The map begins and ends with a whole vector.
      const Window inside((x0 - lead) / V, y0, (lead + columns + V - 1) / V, rows, p.w / V, p.h);
      stage_nchw<T, S, V>(p, planes, count, tile, inside, x0 - lead, y0);
    }
  });
  __syncthreads();

  const int row_index = small_quotient(tid, p.tile_w), strip = small_quotient(row_index, p.group);
  const int column = tid - row_index * p.tile_w, plane = row_index - strip * p.group;
  const int out_x = out_x0 + column, out_y = out_y0 + strip * kRows;
  const bool reduces = p.reduction.mean || p.reduction.partials;
  const int valid = plane < count && out_x < p.out_w ? min(kRows, p.out_h - out_y) : 0;  // rows of this thread
  ShiftedSums<1> sums;
  if (valid > 0) {
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
          if (row >= valid) return;
          const T stored = from_float<T>(activate(normalize(values[0]), p.epilogue.activation));
          *out = stored;
          out += p.y_stride.h;
          values[0] = to_float(stored);
          if (reduces) sums.add(values, row == 0 && p.reduction.shifts);
        });
  }

  if (reduces) {
    Moments moments[1];
    sums.moments(moments, max(valid, 0));
    __syncthreads();  // the tile's memory is reused
    const int members = p.tile_w * p.strips, member = strip * p.tile_w + column;
    merge_block<1>(moments, reinterpret_cast<Moments*>(shared), plane * members, 1, member, members);
    if (member == 0 && plane < count) {
      const int n = (plane0 + plane) / p.c;
      store_moments<1>(p.reduction, moments, n, tile_index, tiles, (plane0 + plane) % p.c, p.c);
    }
  }
}

}  // namespace effk::dwconv
