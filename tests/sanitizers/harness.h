// The CPU kernels without PyTorch: threads of our own, and memory that ends where its contents end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "common/activation.h"
#include "common/cpu_isa.h"
#include "common/layout.h"
#include "common/types.h"

namespace effk::sanitized {

inline size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
inline Dtype compute_dtype(Dtype dtype) { return dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32; }

// Memory with no byte to spare, filled with 0xff: NaN in every format.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t count) : element_(size_of(dtype)), bytes_(element_ * count) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, std::max<size_t>(bytes_, 1)) != 0) std::abort();
    data_.reset(static_cast<unsigned char*>(data), &std::free);
    std::fill_n(data_.get(), bytes_, 0xff);
  }

  // Random numbers between 1/8 and 4 and their negatives.
  static Buffer random(Dtype dtype, int64_t count);

  // `bytes` of memory, a whole number of elements.
  static Buffer of_bytes(Dtype dtype, int64_t bytes) { return Buffer(dtype, bytes / size_of(dtype)); }

  void* data() const { return data_.get(); }
  bool operator==(const Buffer& other) const { return std::memcmp(data(), other.data(), bytes_) == 0; }
  bool is_written() const;

 private:
  size_t element_, bytes_;
  std::shared_ptr<unsigned char> data_;
};

enum class Layout { kNchw, kChannelsLast, kSlicedNchw, kSlicedChannelsLast };
constexpr Layout kLayouts[] = {Layout::kNchw, Layout::kChannelsLast, Layout::kSlicedNchw, Layout::kSlicedChannelsLast};
constexpr Reduce kReductions[] = {Reduce::kNone, Reduce::kMean, Reduce::kStatistics};

// The dtypes of cases. Instruction sets that only add products of bfloat16 have no other, and none without products.
inline std::vector<Dtype> dtypes(bool products) {
  if (cpu_isa() <= CpuIsa::kAvx512) return {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat64};
  return products ? std::vector{Dtype::kBFloat16} : std::vector<Dtype>{};
}

// A random map, its memory one element off alignment; a slice lies in the middle of a larger map.
struct RandomMap {
  RandomMap(Dtype dtype, Layout layout, int64_t n, int64_t c, int64_t h, int64_t w);

  Map map;
  bool channels_last;

 private:
  Buffer memory_;
};

// Scale and shift of [rows, channels] random values, each of them or null.
struct RandomAffine {
  RandomAffine(Dtype dtype, int64_t channels, bool scale, bool shift, int activation, int64_t rows = 1);

  Affine affine;

 private:
  Buffer scale_, shift_;
};

// What the backward of a BatchNorm takes, [channels] random values each; a fixed one has no slope.
struct RandomNorm {
  RandomNorm(Dtype dtype, int64_t channels, bool fixed, int activation);

  NormBackward norm;

 private:
  Buffer values_;
};

// A dense map in `memory`, to be written.
Map output_map(const Buffer& memory, bool channels_last, int64_t n, int64_t c, int64_t h, int64_t w);

// Units [0, units) on `threads` threads, each with scratch memory of its own.
template <class Run>
void parallel_for(int threads, int64_t units, Dtype dtype, int64_t scratch_size, Run run) {
  const int64_t share = (units + threads - 1) / threads;
  std::vector<std::thread> pool;
  for (int64_t begin = 0; begin < units; begin += share)
    pool.emplace_back([=] {
      const Buffer scratch(dtype, scratch_size);
      run(begin, std::min(begin + share, units), scratch.data());
    });
  for (std::thread& thread : pool) thread.join();
}

// Computes the same on one thread and on several: outputs must be written in full, and have the same bits.
void check(const std::string& name, const std::function<std::vector<Buffer>(int threads)>& compute);

// A file of cases registers itself: `static const Cases cases([] { check(...); });`.
struct Cases {
  explicit Cases(void (*run)());
};

}  // namespace effk::sanitized
