// The 1x1 convolution as a matrix product, pixels by output channels: x is gated on its way to shared memory, and what
// follows the convolution is applied to the finished tile.
#pragma once

#include "common/cuda_vec.cuh"
#include "common/matrix.cuh"
#include "common/transform.cuh"
#include "pointwise_inference/plan.h"

namespace effk::pointwise_inference {

template <class T>
constexpr int kChunk = kChunkBytes / sizeof(T);
template <class T>
constexpr int kPitch = kRowBytes / sizeof(T);

// A chunk of `kRows` rows of an operand, on its way to shared memory in the registers of the block's threads. A thread
// loads vectors along the depth, or, where that cannot be, single values whose rows are neighbours among the threads.
template <class T, int kRows>
class Operand {
 public:
  static constexpr int V = kVector<T>, kVectors = kChunk<T> / V;
  static constexpr int kLoads = (kRows * kVectors + kThreads - 1) / kThreads;
  static_assert(kThreads % kRows == 0 || kRows % kThreads == 0);

  // `row(i)` is where row i begins, or null: then it is zero.
  template <class Row>
  __device__ __forceinline__ Operand(bool aligned, int64_t stride, int depth, Row row)
      : aligned_(aligned), stride_(stride), depth_(depth) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = aligned ? (threadIdx.x + i * kThreads) / kVectors : threadIdx.x % kRows;
      from_[i] = at < kRows ? row(at) : nullptr;
    }
  }

  // Elements k0 and on of each row, times those of `gate` where there is one.
  __device__ __forceinline__ void load(int k0, const float* gate) {
    if (aligned_) {
      const int k = k0 + threadIdx.x % kVectors * V;
      const bool exists = k < depth_;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool loads = exists && from_[i];
        vec_[i] = load_some<V>(loads ? from_[i] + k : nullptr, 1, loads ? V : 0, true);
      }
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        const auto four = gate && exists ? Vec<float, 4>::load_global(gate + k + v) : Vec<float, 4>{{1, 1, 1, 1}};
#pragma unroll
        for (int u = 0; u < 4; ++u) gate_[v + u] = four.at[u];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLoads * V; ++i) {
        const int k = k0 + (threadIdx.x + i * kThreads) / kRows;
        const bool exists = from_[0] && k < depth_ && k < k0 + kChunk<T>;
        T& value = vec_[i / V].at[i % V];
        value = exists ? load_global(from_[0] + k * stride_) : from_float<T>(0.0f);
        if (gate && exists) value = from_float<T>(to_float(value) * load_global(gate + k));
      }
    }
  }

  __device__ __forceinline__ void store(T* shared, bool gated) {
    if (aligned_) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = threadIdx.x + i * kThreads;
        if (at >= kRows * kVectors) break;
        if (gated) {
#pragma unroll
          for (int v = 0; v < V; ++v) vec_[i].at[v] = from_float<T>(to_float(vec_[i].at[v]) * gate_[v]);
        }
        vec_[i].store(shared + at / kVectors * kPitch<T> + at % kVectors * V);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLoads * V; ++i) {
        const int at = threadIdx.x + i * kThreads;
        if (at < kRows * kChunk<T>) shared[at % kRows * kPitch<T> + at / kRows] = vec_[i / V].at[i % V];
      }
    }
  }

 private:
  const bool aligned_;
  const int64_t stride_;
  const int depth_;
  const T* from_[kLoads];
  Vec<T, V> vec_[kLoads];
  float gate_[V];
};

template <class T, int kPixels, int kChannels>
__global__ void __launch_bounds__(kThreads, 2) kernel(const Params p) {
  using Product = WarpProduct<T, kPixels / kWarpsDown / 16, kChannels / kWarpsAcross / 8>;
  constexpr int kBuffer = (kPixels + kChannels) * kPitch<T>;
  T* buffers = reinterpret_cast<T*>(shared_memory());

  const int channel0 = blockIdx.x % p.channel_tiles * kChannels;
  const int pixel0 = blockIdx.x / p.channel_tiles % p.tiles * kPixels;
  const int64_t n = blockIdx.x / p.channel_tiles / p.tiles;
  const float* gate = p.gate ? p.gate + n * p.c : nullptr;
  const int warp = threadIdx.x / 32;
  const int row0 = warp % kWarpsDown * Product::kRows, column0 = warp / kWarpsDown * Product::kColumns;

  Product product;
  {
    Operand<T, kPixels> x(p.x_aligned, p.x_stride.c, p.c, [&](int i) -> const T* {
      const int pixel = pixel0 + i, row = pixel / p.w;
      if (pixel >= p.pixels) return nullptr;
      return static_cast<const T*>(p.x) + n * p.x_stride.n + int64_t{row} * p.x_stride.h +
             int64_t{pixel - row * p.w} * p.x_stride.w;
    });
    Operand<T, kChannels> weight(p.weight_aligned, 1, p.c, [&](int i) -> const T* {
      return channel0 + i < p.out_c ? static_cast<const T*>(p.weight) + int64_t{channel0 + i} * p.c : nullptr;
    });
    const auto load = [&](int k) {
      x.load(k, gate);
      weight.load(k, nullptr);
    };
    const auto store = [&](T* buffer) {
      x.store(buffer, gate);
      weight.store(buffer + kPixels * kPitch<T>, false);
    };
    load(0);
    store(buffers);
    __syncthreads();
    T *buffer = buffers, *next = buffers + kBuffer;
    for (int k = 0; k < p.c; k += kChunk<T>) {
      const bool more = k + kChunk<T> < p.c;
      if (more) load(k + kChunk<T>);
      product.add(buffer + row0 * kPitch<T>, kPitch<T>, buffer + (kPixels + column0) * kPitch<T>, kPitch<T>, kChunk<T>,
                  p.tf32);
      if (more) store(next);
      __syncthreads();
      T* done = buffer;
      buffer = next;
      next = done;
    }
  }

  constexpr int kProductPitch = product_pitch(kChannels);
  float* finished = reinterpret_cast<float*>(buffers);
#pragma unroll
  for (int i = 0; i < Product::kLaneRows; ++i)
#pragma unroll
    for (int j = 0; j < Product::kLaneColumns; ++j)
      product.pair(i, j).store(finished + (row0 + product.row(i)) * kProductPitch + column0 + product.column(j));
  __syncthreads();

  const T* residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  // Values of one pixel and V channels.
  const auto finish = [&](auto width, int pixel, int channel, const auto& transform) {
    constexpr int V = decltype(width)::value;
    const int c = channel0 + channel, at = pixel0 + pixel, row = at / p.w, column = at - row * p.w;
    if (at >= p.pixels || c >= p.out_c) return;
    const auto offset = [&](const Strides& stride) {
      return n * stride.n + c * stride.c + int64_t{row} * stride.h + int64_t{column} * stride.w;
    };
    Vec<T, V> vec;
    if (residual) vec = Vec<T, V>::load_global(residual + offset(p.residual_stride));
    constexpr int kLoad = V < 4 ? V : 4;
    float values[V];
#pragma unroll
    for (int v = 0; v < V; v += kLoad) {
      const auto some = Vec<float, kLoad>::load(finished + pixel * kProductPitch + channel + v);
#pragma unroll
      for (int u = 0; u < kLoad; ++u) values[v + u] = some.at[u];
    }
    transform(values);
#pragma unroll
    for (int v = 0; v < V; ++v) vec.at[v] = from_float<T>(residual ? values[v] + to_float(vec.at[v]) : values[v]);
    vec.store_global(y + offset(p.y_stride));
  };
  if (p.y_aligned) {
    constexpr int V = kVector<T>, kVectors = kChannels / V;
    const int channel = threadIdx.x % kVectors * V;
    const ChannelTransform<T, V> transform(p.epilogue, channel0 + channel, p.out_c - channel0 - channel);
    for (int pixel = threadIdx.x / kVectors; pixel < kPixels; pixel += kThreads / kVectors)
      finish(std::integral_constant<int, V>(), pixel, channel, transform);
  } else {
    // Neighbouring threads store neighbouring pixels.
    const int pixel = threadIdx.x % kPixels;
    for (int channel = threadIdx.x / kPixels; channel < kChannels; channel += kThreads / kPixels) {
      const ChannelTransform<T, 1> transform(p.epilogue, channel0 + channel, p.out_c - channel0 - channel);
      finish(std::integral_constant<int, 1>(), pixel, channel, transform);
    }
  }
}

}  // namespace effk::pointwise_inference
