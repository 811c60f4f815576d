// effkernels::dwconv.cpp and effkernels::expand_dwconv.cpp, the depthwise convolution on the CPU.
#include "cpu_kernel.h"
#include "cpu_tensor.h"
#include "expand_tensor.h"

namespace effk {
namespace {

// Of x, or of its expansion.
std::tuple<Tensor, Tensor> convolve(
    const Tensor& x, const std::optional<Tensor>& expand, const Tensor& weight, std::optional<Tensor> mean1, std::optional<Tensor> var1,
    std::optional<Tensor> gamma1, std::optional<Tensor> beta1, double eps1, int64_t act1, std::optional<Tensor> mean2,
    std::optional<Tensor> var2, std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2,
    int64_t stride, int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w, int64_t reduce) {
  const Dtype dtype = dtype_of(x);
  const ExpandedMap source(x, expand);
  const int64_t n = x.size(0), c = source.map().c, k = weight.size(2);
  require(weight.scalar_type() == x.scalar_type() && has_shape(weight, {c, 1, k, k}) && (k == 3 || k == 5 || k == 7),
          "effkernels::dwconv: weight must be [C, 1, k, k] with k 3, 5 or 7, of the dtype of x");
  require(stride == 1 || stride == 2, "effkernels::dwconv: stride must be 1 or 2");
  require(pad_top >= 0 && pad_left >= 0 && out_h > 0 && out_w > 0,
          "effkernels::dwconv: padding must not be negative, the output not empty");
  const FoldedNorm prologue(mean1, var1, gamma1, beta1, eps1, act1, dtype, c);
  const FoldedNorm epilogue(mean2, var2, gamma2, beta2, eps2, act2, dtype, c);
  const bool channels_last = expand || is_channels_last(x);
  const Tensor filter = torch::stable::contiguous(weight);  // small
  const Tensor y = empty_map(x, {n, c, out_h, out_w}, channels_last);

  DwconvParams p{};
  p.dtype = dtype;
  p.x = source.map();
  p.expand = source.expansion();
  p.weight = filter.const_data_ptr();
  p.kernel_size = static_cast<int32_t>(k);
  p.stride = static_cast<int32_t>(stride);
  p.pad_top = pad_top;
  p.pad_left = pad_left;
  p.prologue = prologue.affine();
  p.epilogue = epilogue.affine();
  p.y = y.mutable_data_ptr();
  p.channels_last = channels_last;
  p.out_h = out_h;
  p.out_w = out_w;
  p.reduce = reduce_of(reduce);

  EFFK_PRODUCT_FUNCTION(dwconv_plan, p.dtype)(p);
  const size_t element = compute_size(dtype);
  p.packed = scratch<0>(p.packed_size * element);
  std::vector<double> partials(p.reduce == Reduce::kNone ? 0 : n * p.bands * 2 * c);
  p.partials = partials.data();
  EFFK_PRODUCT_FUNCTION(dwconv_pack, p.dtype)(p);
  const auto run = EFFK_PRODUCT_FUNCTION(dwconv_run, p.dtype);
  for_units(p.units, [&](int64_t begin, int64_t end) {
    run(p, begin, end, scratch<1>(p.scratch_size * element));
  });

  if (p.reduce == Reduce::kNone) return {y, empty_vector(x, 0, statistics_dtype(x))};
  const auto values = [&](int64_t band) {
    return static_cast<double>(std::min(p.band_rows, p.out_h - band * p.band_rows) * p.out_w);
  };
  return {y, merge_partials(y, p.partials, p.bands, p.reduce, values)};
}

std::tuple<Tensor, Tensor> dwconv(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> mean1, std::optional<Tensor> var1,
    std::optional<Tensor> gamma1, std::optional<Tensor> beta1, double eps1, int64_t act1, std::optional<Tensor> mean2,
    std::optional<Tensor> var2, std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2,
    int64_t stride, int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w, int64_t reduce) {
  return convolve(x, std::nullopt, weight, mean1, var1, gamma1, beta1, eps1, act1, mean2, var2, gamma2, beta2, eps2, act2,
                  stride, pad_top, pad_left, out_h, out_w, reduce);
}

std::tuple<Tensor, Tensor> expand_dwconv(
    const Tensor& x, const Tensor& expand, std::optional<Tensor> mean1, std::optional<Tensor> var1,
    std::optional<Tensor> gamma1, std::optional<Tensor> beta1, double eps1, int64_t act1, const Tensor& depthwise,
    std::optional<Tensor> mean2, std::optional<Tensor> var2, std::optional<Tensor> gamma2, std::optional<Tensor> beta2,
    double eps2, int64_t act2, int64_t stride, int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w,
    int64_t reduce) {
  return convolve(x, expand, depthwise, mean1, var1, gamma1, beta1, eps1, act1, mean2, var2, gamma2, beta2, eps2, act2,
                  stride, pad_top, pad_left, out_h, out_w, reduce);
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  m.impl("dwconv.cpp", TORCH_BOX(&dwconv));
  m.impl("expand_dwconv.cpp", TORCH_BOX(&expand_dwconv));
}

}  // namespace
}  // namespace effk
