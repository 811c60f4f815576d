// Between PyTorch's tensors (stable ABI) and the torch-free CPU kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/activation.h"
#include "common/tensor.h"

namespace effk {

inline bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

// Means, variances and other per-channel sums are at least float32.
inline ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// f(zero of what kernels compute in, which is the dtype of statistics).
template <class F>
void with_compute(Dtype dtype, F f) {
  dtype == Dtype::kFloat64 ? f(double{}) : f(float{});
}

inline size_t compute_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float); }

// Asks for huge pages behind a large tensor: in fresh memory, faults of small pages can take longer than the kernel.
inline void use_huge_pages(const Tensor& t) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + t.numel() * t.element_size()) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes, const int64_t* strides,
                            ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                  static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  const Tensor t(handle);
  use_huge_pages(t);
  return t;
}

// An uninitialised map of the dtype of x.
inline Tensor empty_map(const Tensor& x, std::initializer_list<int64_t> sizes, bool channels_last) {
  int64_t strides[4];
  dense_strides(sizes.begin(), channels_last, strides);
  return empty_strided(x, sizes, strides, x.scalar_type());
}

inline Tensor empty_vector(const Tensor& x, int64_t n, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(x, {n}, &stride, dtype);
}

inline Tensor empty_matrix(const Tensor& x, int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t strides[] = {columns, 1};
  return empty_strided(x, {rows, columns}, strides, dtype);
}

// Calls f(pointer to const storage type) for a small tensor of any floating dtype.
template <class F>
auto with_data(const Tensor& t, F f) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(static_cast<const float*>(data));
    case ScalarType::Half: return f(static_cast<const c10::Half*>(data));
    case ScalarType::BFloat16: return f(static_cast<const c10::BFloat16*>(data));
    default: return f(static_cast<const double*>(data));
  }
}

// The values of a small strided vector of any floating dtype.
inline std::vector<double> values_of(const Tensor& t, int64_t offset, int64_t stride, int64_t count) {
  std::vector<double> values(count);
  with_data(t, [&](auto* data) {
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(data[offset + i * stride]);
  });
  return values;
}
inline std::vector<double> values_of(const Tensor& t) { return values_of(t, 0, t.stride(0), t.numel()); }

// BatchNorm as scale and shift per channel, in the dtype that the kernels compute in.
class FoldedNorm {
 public:
  FoldedNorm(const std::optional<Tensor>& mean, const std::optional<Tensor>& var, const std::optional<Tensor>& gamma,
             const std::optional<Tensor>& beta, double eps, int64_t activation, Dtype dtype, int64_t channels)
      : activation_(static_cast<int32_t>(activation)) {
    if (!mean) return;
    require(var.has_value(), "effkernels: a BatchNorm with a mean needs a variance");
    for (const auto* t : {&mean, &var, &gamma, &beta})
      require(!*t || has_shape(**t, {channels}), "effkernels: the tensors of a BatchNorm must have shape [C]");
    dtype == Dtype::kFloat64 ? fold<double>(*mean, *var, gamma, beta, eps) : fold<float>(*mean, *var, gamma, beta, eps);
  }

  Affine affine() const {
    if (values_.empty()) return {nullptr, nullptr, activation_};
    return {values_.data(), values_.data() + values_.size() / 2, activation_};
  }

 private:
  // In double, so that scale and shift are rounded once.
  template <class C>
  void fold(const Tensor& mean, const Tensor& var, const std::optional<Tensor>& gamma,
            const std::optional<Tensor>& beta, double eps) {
    const std::vector<double> means = values_of(mean), vars = values_of(var);
    const std::vector<double> gammas = gamma ? values_of(*gamma) : std::vector<double>(means.size(), 1.0);
    const std::vector<double> betas = beta ? values_of(*beta) : std::vector<double>(means.size(), 0.0);
    values_.resize(2 * means.size() * sizeof(C));
    C *scale = reinterpret_cast<C*>(values_.data()), *shift = scale + means.size();
    for (size_t c = 0; c < means.size(); ++c) {
      const double factor = gammas[c] / std::sqrt(vars[c] + eps);
      scale[c] = static_cast<C>(factor);
      shift[c] = static_cast<C>(betas[c] - means[c] * factor);
    }
  }

  int32_t activation_;
  std::vector<char> values_;
};

// A BatchNorm in the backward pass, in the dtype that the kernels compute in. `grad_means` [2, C] are the means over batch
// and map of dz and of dz * xhat, none where the statistics are fixed.
class BackwardNormVectors {
 public:
  BackwardNormVectors(const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                      const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, double eps,
                      int64_t activation, const std::optional<Tensor>& grad_means, Dtype dtype, int64_t channels)
      : folded_(mean, var, gamma, beta, eps, activation, dtype, channels) {
    if (!mean) return;
    require(!grad_means || has_shape(*grad_means, {2, channels}), "effkernels: grad_means must have shape [2, C]");
    rstd_ = values_of(*var);
    for (double& v : rstd_) v = 1 / std::sqrt(v + eps);
    corrected_ = grad_means.has_value();
    dtype == Dtype::kFloat64 ? fill<double>(*mean, gamma, grad_means) : fill<float>(*mean, gamma, grad_means);
  }

  NormBackward vectors() const {
    const Affine affine = folded_.affine();
    if (values_.empty()) return {nullptr, nullptr, nullptr, nullptr, nullptr, affine.activation};
    const char *mean = values_.data(), *slope = mean + values_.size() / 3, *constant = slope + values_.size() / 3;
    return {affine.scale, affine.shift,  mean, corrected_ ? slope : nullptr, corrected_ ? constant : nullptr,
            affine.activation};
  }

  // 1 / sqrt(var + eps), what turns sums with x - mean into sums with xhat.
  const std::vector<double>& rstd() const { return rstd_; }

 private:
  template <class C>
  void fill(const Tensor& mean, const std::optional<Tensor>& gamma, const std::optional<Tensor>& grad_means) {
    const int64_t channels = static_cast<int64_t>(rstd_.size());
    values_.resize(3 * channels * sizeof(C));
    C *out = reinterpret_cast<C*>(values_.data()), *slope = out + channels, *constant = slope + channels;
    const std::vector<double> means = values_of(mean);
    std::copy(means.begin(), means.end(), out);
    if (!grad_means) return;
    const std::vector<double> gammas = gamma ? values_of(*gamma) : std::vector<double>(channels, 1.0);
    const auto row = [&](int64_t i) {
      return values_of(*grad_means, i * grad_means->stride(0), grad_means->stride(1), channels);
    };
    const std::vector<double> of_dz = row(0), of_product = row(1);
    for (int64_t c = 0; c < channels; ++c) {
      const double factor = rstd_[c] * gammas[c];
      slope[c] = static_cast<C>(-factor * rstd_[c] * of_product[c]);
      constant[c] = static_cast<C>(-factor * of_dz[c]);
    }
  }

  FoldedNorm folded_;
  bool corrected_ = false;
  std::vector<double> rstd_;
  std::vector<char> values_;
};

// A map with the shape and dtype of another.
inline Map map_like(const Tensor& t, const Tensor& other, const char* name) {
  const auto a = t.sizes(), b = other.sizes();
  require(std::equal(a.begin(), a.end(), b.begin(), b.end()) && t.scalar_type() == other.scalar_type(),
          std::string(name) + " has the wrong shape or dtype");
  return map_of(t, name);
}

// A small vector or matrix that may be missing, dense and in the dtype of statistics.
inline std::optional<Tensor> dense_vector(const std::optional<Tensor>& t, std::initializer_list<int64_t> shape,
                                          const Tensor& x, const char* name) {
  if (!t) return std::nullopt;
  require(has_shape(*t, shape) && t->scalar_type() == statistics_dtype(x),
          std::string(name) + " has the wrong shape, or is not in float32 (float64 where x is)");
  return torch::stable::contiguous(*t);
}

inline const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Scratch memory of this thread, kept between calls. `slot` tells apart buffers in use at once.
template <int slot>
void* scratch(size_t bytes) {
  struct Buffer {
    std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};
    size_t size = 0;
  };
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    const size_t size = (bytes + 63) / 64 * 64;
    void* data = std::aligned_alloc(64, size);
    if (!data) throw std::bad_alloc();
    buffer.data.reset(data);
    buffer.size = size;
  }
  return buffer.data.get();
}

// run(first, last) of units [0, units) in the threads of PyTorch's pool. A thread takes those of a share of its own, which
// lie side by side in memory, then what others have left: one may wait longer for memory, or for its core.
template <class Run>
void for_units(int64_t units, Run run) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), units);
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next.store(t * units / threads, std::memory_order_relaxed);
    shares[t].end = (t + 1) * units / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[(t + i) % threads];
        for (int64_t unit; (unit = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) run(unit, unit + 1);
      }
  });
}

// pack(first, last) of the units of a weight of `size` elements: in the threads, but for one that is packed before they wake.
template <class Pack>
void pack_in_units(int64_t units, int64_t size, Pack pack) {
  if (size < 16 << 10)
    pack(0, units);
  else
    for_units(units, pack);
}

// Partial results of a kernel, [images, parts, rows, padded], of which `channels` of each row count.
struct Parts {
  const void* data;
  int64_t images, parts, rows, padded, channels;
};

// out[image * out_image + row * out_row + c * out_channel] = f(row, c, sum over the parts, in their order and in double),
// all of C.
template <class C, class F>
void merge_parts(const Parts& p, C* out, int64_t out_image, int64_t out_row, int64_t out_channel, F f) {
  constexpr int64_t kBlock = 128, kGrain = 32 << 10;  // values
  const C* values = static_cast<const C*>(p.data);
  const int64_t blocks = (p.channels + kBlock - 1) / kBlock;
  const int64_t grain = std::max<int64_t>(kGrain / std::max<int64_t>(p.parts * std::min(p.channels, kBlock), 1), 1);
  torch::stable::parallel_for(0, p.images * p.rows * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlock, row = i / blocks % p.rows, image = i / blocks / p.rows;
      const int64_t count = std::min(p.channels - first, kBlock);
      double total[kBlock] = {};
      for (int64_t part = 0; part < p.parts; ++part) {
        const C* in = values + ((image * p.parts + part) * p.rows + row) * p.padded + first;
        for (int64_t c = 0; c < count; ++c) total[c] += in[c];
      }
      C* to = out + image * out_image + row * out_row;
      for (int64_t c = 0; c < count; ++c)
        to[(first + c) * out_channel] = static_cast<C>(f(row, first + c, total[c]));
    }
  });
}

// Merges the partial sums [n, bands, 2, c] of a kernel, in a fixed order: a mean over each image's map [n, c], or
// batch statistics [2, c] by Chan et al.'s update. `count(band)` is the number of values behind a band's sums.
template <class Count>
Tensor merge_partials(const Tensor& x, const double* partials, int64_t bands, Reduce reduce, Count count) {
  const int64_t n = x.size(0), c = x.size(1);
  const ScalarType dtype = statistics_dtype(x);
  Tensor out = empty_matrix(x, reduce == Reduce::kMean ? n : 2, c, dtype);
  auto merge = [&](auto* result, int64_t begin, int64_t end) {
    using C = std::remove_reference_t<decltype(*result)>;
    std::vector<double> mean(c), squares(c);
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (reduce == Reduce::kMean) {
        total = 0;
        mean.assign(c, 0.0);
      }
      for (int64_t b = 0; b < bands; ++b) {
        const double *first = partials + (i * bands + b) * 2 * c, *second = first + c, m = count(b);
        total += m;
        for (int64_t j = begin; j < end; ++j) {
          if (reduce == Reduce::kMean) {
            mean[j] += first[j];
          } else {
            const double delta = first[j] - mean[j];
            squares[j] += second[j] + delta * delta * (m * (total - m) / total);
            mean[j] += delta * (m / total);
          }
        }
      }
      if (reduce == Reduce::kMean)
        for (int64_t j = begin; j < end; ++j) result[i * c + j] = static_cast<C>(mean[j] / total);
    }
    if (reduce == Reduce::kStatistics)
      for (int64_t j = begin; j < end; ++j) {
        result[j] = static_cast<C>(total > 0 ? mean[j] : NAN);
        result[c + j] = static_cast<C>(total > 0 ? squares[j] / total : NAN);
      }
  };
  const int64_t grain = std::max<int64_t>((8 << 10) / std::max<int64_t>(n * bands, 1), 8);
  void* data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, c, grain, [&](int64_t begin, int64_t end) {
    dtype == ScalarType::Double ? merge(static_cast<double*>(data), begin, end)
                                : merge(static_cast<float*>(data), begin, end);
  });
  return out;
}

}  // namespace effk
