// The gradients of a depthwise convolution's input and weight from one pass over the maps.
//
// A block takes tiles of the input one after the other, of the same channels. Of each it stages dy, the gradient of the
// raw output, with what of it lies around the tile: each value is normalised and its slope taken once. A thread owns a
// column of steps: it slides down the staged tile, the rows of dy that its input sees in registers beside the weights
// and the sums of the weight's gradient. Its own pixels of the input are read, activated and done with step by step.
// Where the input is an expansion, the block first makes that of the tile's pixels, on matrix instructions, in shared
// memory, and reads it there.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/partial_sums.cuh"
#include "common/transform.cuh"
#include "dwconv/kernel.cuh"
#include "dwconv_backward/plan.h"
#include "expand_dwconv/expand.cuh"

namespace effk::dwconv_backward {

using dwconv::Walk;
using dwconv::Window;

// Loads of each map in flight: what registers allow.
template <class T, int V>
constexpr int kBatch = V * sizeof(T) < 8 ? 4 : 2;

template <class T>
constexpr int widest_load(int kernel_size) {
  return load_bytes(kernel_size) / int(sizeof(T));
}

// Stages a tile of V channels per thread in channels_last; `inside` is its part on the map, at (x0, y0).
template <class T, int V>
__device__ __forceinline__ void stage_channels_last(const Params& p, const ChannelBackward* channels, float* tile,
                                                    const Window& inside, int columns, int x0, int y0, int64_t n, int c,
                                                    int lane, int member, int members) {
  const int valid = min(V, p.c - c);
  ChannelBackward channel[V];
#pragma unroll
  for (int v = 0; v < V; ++v) channel[v] = channels[lane + v];
  const auto start = [&](const void* map, const Strides& stride) {
    return static_cast<const T*>(map) + n * stride.n + c * stride.c + int64_t{y0 + inside.top} * stride.h +
           int64_t{x0 + inside.left} * stride.w;
  };
  const T *grad = start(p.grad, p.grad_stride), *y = start(p.y, p.y_stride);
  constexpr int kLoads = kBatch<T, V>;
  Walk walk(inside, member, members);
  while (walk.row < inside.height) {
    Vec<T, V> grads[kLoads], raw[kLoads];
    int at[kLoads];
#pragma unroll
    for (int b = 0; b < kLoads; ++b) {
      const int exist = walk.row < inside.height ? valid : 0;
      const auto load = [&](const T* from, const Strides& stride) {
        return load_some<V>(from + int64_t{walk.row} * stride.h + int64_t{walk.column} * stride.w, stride.c, exist,
                            p.grad_vector == V);
      };
      grads[b] = load(grad, p.grad_stride);
      raw[b] = load(y, p.y_stride);
      at[b] = walk.row < inside.height ? (inside.top + walk.row) * columns + inside.left + walk.column : -1;
      walk.next();
    }
#pragma unroll
    for (int b = 0; b < kLoads; ++b) {
      if (at[b] < 0) break;
      Vec<float, V> dy;
      float of_y[V];
      to_floats(dy.at, grads[b]);
      to_floats(of_y, raw[b]);
      norm_gradient(dy.at, of_y, p.after.forward.activation, channel);
      input_gradient(dy.at, of_y, channel);
      dy.store(tile + at[b] * p.group + lane);
    }
  }
}

// Stages the tiles of `count` planes in NCHW, V columns per load: `inside` counts its columns in such vectors, of which
// the first begins at column x0 of the map.
template <class T, int V>
__device__ __forceinline__ void stage_nchw(const Params& p, const ChannelBackward* channels, int count, float* tile,
                                           const Window& inside, int x0, int y0, int64_t n, int c0) {
  const int area = max(inside.width * inside.height, 1), step = blockDim.x;
  const int step_plane = small_quotient(step, area);
  int plane = small_quotient(threadIdx.x, area);
  Walk walk(inside, threadIdx.x - plane * area, step - step_plane * area);
  if (inside.height == 0) plane = count;
  const auto start = [&](const void* map, const Strides& stride) {
    return static_cast<const T*>(map) + n * stride.n + c0 * stride.c + int64_t{y0 + inside.top} * stride.h +
           int64_t{x0 + inside.left * V} * stride.w;
  };
  const T *grad = start(p.grad, p.grad_stride), *y = start(p.y, p.y_stride);
  constexpr int kLoads = kBatch<T, V>;
  while (plane < count) {
    Vec<T, V> grads[kLoads], raw[kLoads];
    int at[kLoads], from_plane[kLoads];
#pragma unroll
    for (int b = 0; b < kLoads; ++b) {
      from_plane[b] = plane;
      at[b] = plane * p.plane_pitch + (inside.top + walk.row) * p.pitch + (inside.left + walk.column) * V;
      if (plane < count) {
        const auto load = [&](const T* from, const Strides& stride) {
          return Vec<T, V>::load_global(from + plane * stride.c + int64_t{walk.row} * stride.h +
                                        int64_t{walk.column * V} * stride.w);
        };
        grads[b] = load(grad, p.grad_stride);
        raw[b] = load(y, p.y_stride);
      }
      walk.next();
      plane += step_plane;
      if (walk.row >= inside.height) {
        walk.row -= inside.height;
        ++plane;
      }
    }
#pragma unroll
    for (int b = 0; b < kLoads; ++b) {
      if (from_plane[b] >= count) break;
      const ChannelBackward channel[1] = {channels[from_plane[b]]};
      constexpr int kStore = V > 4 ? 4 : V;
#pragma unroll
      for (int first = 0; first < V; first += kStore) {
        Vec<float, kStore> dy;
        float of_y[kStore];
#pragma unroll
        for (int v = 0; v < kStore; ++v) {
          dy.at[v] = to_float(grads[b].at[first + v]);
          of_y[v] = to_float(raw[b].at[first + v]);
        }
        norm_gradient(dy.at, of_y, p.after.forward.activation, channel);
        input_gradient(dy.at, of_y, channel);
        dy.store(tile + at[b] + first);
      }
    }
  }
}

// Where a tile begins: its first step, and the first pixel of that.
template <int S>
struct Place {
  int64_t n;
  int u, v, x, y;

  __device__ __forceinline__ Place(const Params& p, int index) {
    n = index / (p.tiles_h * p.tiles_w);
    const int in_map = index % (p.tiles_h * p.tiles_w);
    u = p.pad_left / S + in_map % p.tiles_w * p.tile_w;
    v = p.pad_top / S + in_map / p.tiles_w * p.strips * steps(S);
    x = u * S - p.pad_left;
    y = v * S - p.pad_top;
  }

  // The tile's part on the map.
  __device__ __forceinline__ Window window(const Params& p) const {
    return {x, y, p.tile_w * S, p.strips * steps(S) * S, p.w, p.h};
  }
};

template <class T, int K, int S, bool kChannelsLast, bool kExpands>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_sm(K, kChannelsLast)) kernel(const Params p) {
  static_assert(kChannelsLast || !kExpands, "layout");
  constexpr int V = kChannelsLast ? lanes(K) : 1, kReach = reach(K, S), kSteps = steps(S);
  unsigned char* shared = shared_memory();
  ChannelBackward* after = reinterpret_cast<ChannelBackward*>(shared);
  Normalize* before = reinterpret_cast<Normalize*>(shared + p.before_offset);
  float* weights = reinterpret_cast<float*>(shared + p.weight_offset);
  float* tile = reinterpret_cast<float*>(shared + p.tile_offset);
  T* narrow = reinterpret_cast<T*>(shared + p.narrow_offset);
  T* expand = reinterpret_cast<T*>(shared + p.expand_offset);
  float* e_tile = reinterpret_cast<float*>(shared + p.e_offset);
  const int tid = threadIdx.x, threads = blockDim.x;
  const int c0 = blockIdx.x % p.groups * p.group, part = blockIdx.x / p.groups, count = min(p.group, p.c - c0);

  for (int i = tid; i < p.group; i += threads) {
    after[i] = {};
    before[i] = {0.0f, 1.0f, 0.0f};
    if (i >= count) continue;
    after[i] = load_backward<T>(p.after, c0 + i, p.c);
    before[i] = load_normalize<T>(p.before, c0 + i);
  }
  for (int i = tid; i < p.group * K * K; i += threads) {
    const int channel = i / (K * K), tap = i % (K * K);
    const T* from = static_cast<const T*>(p.weight) + int64_t{c0} * (K * K) + i;
    weights[tap * p.weight_pitch + channel] = channel < count ? to_float(load_global(from)) : 0.0f;
  }

  // Threads run along channels, columns, strips in channels_last; along columns, planes, strips in NCHW.
  int lane, column, strip;
  if constexpr (kChannelsLast) {
    const int per_pixel = p.group / V, pixel = small_quotient(tid, per_pixel);
    lane = (tid - pixel * per_pixel) * V;
    strip = small_quotient(pixel, p.tile_w);
    column = pixel - strip * p.tile_w;
  } else {
    const int row = small_quotient(tid, p.tile_w);
    column = tid - row * p.tile_w;
    strip = small_quotient(row, p.group);
    lane = row - strip * p.group;
  }
  const int member = strip * p.tile_w + column, members = p.strips * p.tile_w;
  const int c = c0 + lane, valid = min(V, p.c - c);  // channels of this thread; none if negative
  const int rows = p.strips * kSteps + kReach, columns = p.tile_w + kReach;

  // Of the weight's gradient by taps, of dz, and of dz * (x - mean).
  constexpr int kOfDz = K * K, kOfProduct = K * K + 1;
  float sums[K * K + 2][V];
#pragma unroll
  for (int i = 0; i < K * K + 2; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) sums[i][v] = 0.0f;

  const int first_tile = part * p.tiles_each, end_tile = min(first_tile + p.tiles_each, p.tiles);
  if constexpr (kExpands) {
    stage_weights(expand, p.operands, c0, p.group, p.c, threads);
    const Place<S> place(p, first_tile);
    stage_pixels(narrow, p.operands, place.window(p), place.n, place.x, place.y, threads);
  }
  for (int index = first_tile; index < end_tile; ++index) {
    const Place<S> place(p, index);
    const int64_t n = place.n;
    const int x0 = place.u - kReach, y0 = place.v - kReach;  // where dy begins
    const int lead = kChannelsLast ? 0 : (x0 % p.grad_vector + p.grad_vector) % p.grad_vector;

    int row = place.y + strip * kSteps * S;
    const int column0 = place.x + column * S;
    const auto start = [&](const void* map, const Strides& stride) {
      return static_cast<const T*>(map) + n * stride.n + c * stride.c + int64_t{row} * stride.h +
             int64_t{column0} * stride.w;
    };
    T* out = const_cast<T*>(start(p.grad_norm, p.grad_norm_stride));
    const Window own = place.window(p);
    using Stored = std::conditional_t<kExpands, float, T>;
    const Stored* x;
    int x_row, x_column;
    if constexpr (kExpands) {
      x_column = p.e_pitch;
      x_row = own.width * x_column;
      x = e_tile + (row - place.y - own.top) * x_row + (column0 - place.x - own.left) * x_column + lane;
    } else {
      x_row = p.x_stride.h;
      x_column = p.x_stride.w;
      x = start(p.x, p.x_stride);
    }
    const auto exists = [&](int r, int q) {
      return unsigned(row + r) < unsigned(p.h) && unsigned(column0 + q) < unsigned(p.w);
    };
    Vec<Stored, V> next[S][S];  // a step's pixels are loaded while the one before is worked on
    const auto load_next = [&](int ahead) {
#pragma unroll
      for (int r = 0; r < S; ++r)
#pragma unroll
        for (int q = 0; q < S; ++q) {
          const Stored* pixel = x + (ahead + r) * int64_t{x_row} + q * x_column;
          const bool here = exists(ahead + r, q);
          if constexpr (kExpands) {
            next[r][q] = here ? Vec<float, V>::load(pixel) : Vec<float, V>{};
          } else {
            next[r][q] = load_some<V>(pixel, p.x_stride.c, here ? valid : 0, p.x_vector);
          }
        }
    };
    if constexpr (!kExpands) load_next(0);

    __syncthreads();  // the threads are done with the tile before
    // Around the map dy is zero, and stays so where a tile is a map.
    const bool hangs_over = x0 < 0 || y0 < 0 || x0 + columns > p.out_w || y0 + rows > p.out_h;
    if (hangs_over && (index == first_tile || p.tiles_h * p.tiles_w > 1))
      clear_shared(tile, (kChannelsLast ? (rows * columns * p.group + 3) / 4 * 4 : p.group * p.plane_pitch) *
                             int(sizeof(float)));
    for (int i = tid; i < count; i += threads) set_image(after[i], p.after, n, c0 + i, p.c);
    if constexpr (kExpands) wait_for_copies();
    __syncthreads();
    if constexpr (kChannelsLast) {
      const Window inside(x0, y0, columns, rows, p.out_w, p.out_h);
      stage_channels_last<T, V>(p, after, tile, inside, columns, x0, y0, n, c, lane, member, members);
    } else {
      with_width(p.grad_vector, [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        if constexpr (kWidth <= widest_load<T>(K)) {
          // The map begins and ends with a whole vector.
          const Window inside((x0 - lead) / kWidth, y0, (lead + columns + kWidth - 1) / kWidth, rows,
                              p.out_w / kWidth, p.out_h);
          stage_nchw<T, kWidth>(p, after, count, tile, inside, x0 - lead, y0, n, c0);
        }
      });
    }
    if constexpr (kExpands) {
      using Product = UnitProduct<T>;
      const int pixels = own.width * own.height;
      multiply_pixels(narrow, expand, p.operands, pixels, p.group, threads, false, [&](const Product& product,
                                                                                        int pixel0, int channel0) {
#pragma unroll
        for (int i = 0; i < Product::kLaneRows; ++i) {
          const int pixel = pixel0 + product.row(i);
          if (pixel >= pixels) break;
#pragma unroll
          for (int j = 0; j < Product::kLaneColumns; ++j)
            product.pair(i, j).store(e_tile + pixel * p.e_pitch + channel0 + product.column(j));
        }
      });
    }
    __syncthreads();
    if constexpr (kExpands) {
      if (index + 1 < end_tile) {
        const Place<S> following(p, index + 1);
        stage_pixels(narrow, p.operands, following.window(p), following.n, following.x, following.y, threads);
      }
      load_next(0);
    }

    float weight[K * K][V];
    Normalize normalize[V];
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      const auto vec = Vec<float, V>::load(weights + tap * p.weight_pitch + lane);
#pragma unroll
      for (int v = 0; v < V; ++v) weight[tap][v] = vec.at[v];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) normalize[v] = before[lane + v];
    const int row_pitch = kChannelsLast ? columns * p.group : p.pitch, column_pitch = kChannelsLast ? p.group : 1;
    const float* from = tile + strip * kSteps * row_pitch + (kReach + column) * column_pitch +
                        (kChannelsLast ? lane : lane * p.plane_pitch + lead);

    // The rows of dy that a step sees, from its own column leftwards; row i is dy[i % kSeen].
    constexpr int kSeen = kReach + 1;
    float dy[kSeen][kSeen][V];
    const auto read_row = [&](float(&values)[kSeen][V]) {
#pragma unroll
      for (int j = 0; j < kSeen; ++j) {
        const auto vec = Vec<float, V>::load(from - j * column_pitch);
#pragma unroll
        for (int v = 0; v < V; ++v) values[j][v] = vec.at[v];
      }
      from += row_pitch;
    };
#pragma unroll
    for (int i = 0; i < kReach; ++i) read_row(dy[i]);
#pragma unroll 1
    for (int first = 0; first < kSteps; first += kSeen) {
#pragma unroll
      for (int step = 0; step < kSeen; ++step) {
        if (first + step >= kSteps) break;
        read_row(dy[(step + kReach) % kSeen]);
        float pixels[S][S][V];
#pragma unroll
        for (int r = 0; r < S * S; ++r) to_floats(pixels[r / S][r % S], next[r / S][r % S]);
        if (first + step + 1 < kSteps) load_next(S);
#pragma unroll
        for (int r = 0; r < S; ++r) {
#pragma unroll
          for (int q = 0; q < S; ++q) {
            const bool here = exists(r, q);
            float centred[V], h[V], slopes[V], dh[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              centred[v] = pixels[r][q][v] - normalize[v].mean;
              h[v] = normalize[v](pixels[r][q][v]);
              dh[v] = 0.0f;
            }
            activate_all_with_slopes(h, slopes, p.before.activation);
#pragma unroll
            for (int v = 0; v < V; ++v) h[v] = here ? h[v] : 0.0f;
#pragma unroll
            for (int ky = r; ky < K; ky += S)
#pragma unroll
              for (int kx = q; kx < K; kx += S)
#pragma unroll
                for (int v = 0; v < V; ++v) {
                  const float d = dy[(step + kReach - ky / S) % kSeen][kx / S][v];
                  dh[v] = fmaf(d, weight[ky * K + kx][v], dh[v]);
                  sums[ky * K + kx][v] = fmaf(d, h[v], sums[ky * K + kx][v]);
                }
            if (!here || !p.grad_norm) continue;
            Vec<T, V> dz;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              dz.at[v] = from_float<T>(dh[v] * slopes[v]);
              sums[kOfDz][v] += to_float(dz.at[v]);
              sums[kOfProduct][v] = fmaf(to_float(dz.at[v]), centred[v], sums[kOfProduct][v]);
            }
            store_some<V>(out + r * int64_t{p.grad_norm_stride.h} + q * p.grad_norm_stride.w, dz, p.grad_norm_stride.c,
                          valid, p.grad_norm_vector);
          }
        }
        row += S;
        x += S * int64_t{x_row};
        out += S * int64_t{p.grad_norm_stride.h};
      }
    }
  }

  __syncthreads();  // the tile's memory is reused
  add_members<kSumsAtOnce>(sums, tile, lane, p.group, member, members, [&](int sum, int channel, float total) {
    if (channel >= count) return;
    if (sum < K * K) {
      if (p.sums.first) p.sums.first[part * p.sums.pitch + int64_t{c0 + channel} * (K * K) + sum] = total;
    } else if (p.sums.second) {
      if (sum == kOfProduct) total *= load_inverse_deviation<T>(p.before, c0 + channel);
      p.sums.second[part * p.sums.pitch + p.sums.split + int64_t{sum - kOfDz} * p.c + c0 + channel] = total;
    }
  });
}

}  // namespace effk::dwconv_backward
