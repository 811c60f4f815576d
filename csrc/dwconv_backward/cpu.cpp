// effkernels::dwconv_backward.cpp and effkernels::expand_dwconv_gradients.cpp on the CPU.
#include "common/cpu_tensor.h"
#include "cpu_kernel.h"
#include "expand_tensor.h"

namespace effk {
namespace {

// What is wanted: the sums of BatchNorm, the gradients of x, of `expand` and of the weight.
struct Needs {
  bool sums, x, expand, weight;
};

// The gradients of x (with an expansion; without one that of before(x)), of `expand` and of the weight, and the sums.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, const Tensor& y,
    const Tensor& mean2, const Tensor& var2, const std::optional<Tensor>& gamma2, const std::optional<Tensor>& beta2,
    double eps2, int64_t act2, const std::optional<Tensor>& grad_means, const Tensor& weight, const Tensor& x,
    const std::optional<Tensor>& expand, const std::optional<Tensor>& centre, const std::optional<Tensor>& mean1,
    const std::optional<Tensor>& var1, const std::optional<Tensor>& gamma1, const std::optional<Tensor>& beta1,
    double eps1, int64_t act1, int64_t stride, int64_t pad_top, int64_t pad_left, Needs need) {
  const Dtype dtype = dtype_of(x);
  const ExpandedMap source(x, expand);
  const Map map = source.map(), raw = map_of(y, "y");
  const int64_t c = map.c, k = weight.size(2);
  require(weight.scalar_type() == x.scalar_type() && has_shape(weight, {c, 1, k, k}) && (k == 3 || k == 5 || k == 7),
          "effkernels::dwconv_backward: weight must be [C, 1, k, k] with k 3, 5 or 7, of the dtype of x");
  require(stride == 1 || stride == 2, "effkernels::dwconv_backward: stride must be 1 or 2");
  require(pad_top >= 0 && pad_left >= 0, "effkernels::dwconv_backward: padding must not be negative");
  require(raw.n == map.n && raw.c == c && y.scalar_type() == x.scalar_type(),
          "effkernels::dwconv_backward: y must have the batch, channels and dtype of x");
  require(has_shape(grad, {raw.n, c, raw.h, raw.w}) && grad.scalar_type() == x.scalar_type(),
          "effkernels::dwconv_backward: grad must have the shape and dtype of y");
  const BackwardNormVectors after(mean2, var2, gamma2, beta2, eps2, act2, grad_means, dtype, c);
  const BackwardNormVectors before(mean1, var1, gamma1, beta1, eps1, act1, std::nullopt, dtype, c);
  const auto scales = dense_vector(scale, {map.n, c}, x, "effkernels::dwconv_backward: scale");
  const auto shifts = dense_vector(shift, {map.n, c}, x, "effkernels::dwconv_backward: shift");
  const Tensor filter = torch::stable::contiguous(weight);
  const ScalarType wide = statistics_dtype(x);
  const auto centres = dense_vector(centre, {x.size(1)}, x, "effkernels::dwconv_backward: centre");
  const Tensor grad_x = need.x ? empty_map(x, {map.n, x.size(1), map.h, map.w}, is_channels_last(x))
                               : empty_vector(x, 0, x.scalar_type());
  const Tensor grad_expand = need.expand ? empty_matrix(x, c, x.size(1), wide) : empty_vector(x, 0, wide);
  const int64_t weight_strides[] = {k * k, k * k, k, 1};
  const Tensor grad_weight =
      need.weight ? empty_strided(x, {c, 1, k, k}, weight_strides, wide) : empty_vector(x, 0, wide);
  const Tensor sums = need.sums ? empty_matrix(x, 2, c, wide) : empty_vector(x, 0, wide);

  DwconvBackwardParams p{};
  p.dtype = dtype;
  p.grad = map_of(grad, "grad");
  p.y = raw;
  p.x = map;
  p.expand = source.expansion();
  if (need.x) (expand ? p.grad_x : p.grad_norm) = map_of(grad_x);
  p.centre = data_of(centres);
  p.weight = filter.const_data_ptr();
  p.kernel_size = static_cast<int32_t>(k);
  p.stride = static_cast<int32_t>(stride);
  p.pad_top = pad_top;
  p.pad_left = pad_left;
  p.scale = data_of(scales);
  p.shift = data_of(shifts);
  p.after = after.vectors();
  p.before = before.vectors();
  p.need_weight = need.weight;

  EFFK_PRODUCT_FUNCTION(dwconv_backward_plan, p.dtype)(p);
  p.packed = scratch<0>(p.packed_size);
  p.products = scratch<2>(p.products_size);
  const int64_t parts = map.n * p.bands;
  if (need.sums) p.sums = scratch<3>(parts * 2 * p.padded * compute_size(dtype));
  if (need.expand) p.expand_products = scratch<4>(p.expand_products_size);
  EFFK_PRODUCT_FUNCTION(dwconv_backward_pack, p.dtype)(p);
  const auto run = EFFK_PRODUCT_FUNCTION(dwconv_backward_run, p.dtype);
  for_units(p.units, [&](int64_t begin, int64_t end) {
    run(p, begin, end, scratch<1>(p.scratch_size));
  });

  with_compute(dtype, [&](auto zero) {
    using C = decltype(zero);
    if (need.weight)
      merge_parts({p.products, 1, parts, k * k, p.padded, c}, static_cast<C*>(grad_weight.mutable_data_ptr()), 0, 1, k * k,
                  [](int64_t, int64_t, double sum) { return sum; });
    if (need.sums)
      merge_parts({p.sums, 1, parts, 2, p.padded, c}, static_cast<C*>(sums.mutable_data_ptr()), 0, c, 1,
                  [&](int64_t row, int64_t channel, double sum) { return row == 1 ? sum * before.rstd()[channel] : sum; });
    if (need.expand)
      merge_parts({p.expand_products, 1, parts, c, p.expand_padded, x.size(1)},
                  static_cast<C*>(grad_expand.mutable_data_ptr()), 0, x.size(1), 1,
                  [](int64_t, int64_t, double sum) { return sum; });
  });
  return {grad_x, grad_expand, grad_weight, sums};
}

std::tuple<Tensor, Tensor, Tensor> dwconv_backward(
    const Tensor& grad, std::optional<Tensor> scale, std::optional<Tensor> shift, const Tensor& y, const Tensor& mean2,
    const Tensor& var2, std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2,
    std::optional<Tensor> grad_means, const Tensor& weight, const Tensor& x, std::optional<Tensor> mean1,
    std::optional<Tensor> var1, std::optional<Tensor> gamma1, std::optional<Tensor> beta1, double eps1, int64_t act1,
    int64_t stride, int64_t pad_top, int64_t pad_left, bool need_input, bool need_weight) {
  const Needs need{need_input && mean1, need_input, false, need_weight};
  auto [grad_norm, _, grad_weight, sums] =
      backward(grad, scale, shift, y, mean2, var2, gamma2, beta2, eps2, act2, grad_means, weight, x, std::nullopt,
               std::nullopt, mean1, var1, gamma1, beta1, eps1, act1, stride, pad_top, pad_left, need);
  return {grad_norm, grad_weight, sums};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expand_dwconv_gradients(
    const Tensor& grad, std::optional<Tensor> scale, std::optional<Tensor> shift, const Tensor& y, const Tensor& mean2,
    const Tensor& var2, std::optional<Tensor> gamma2, std::optional<Tensor> beta2, double eps2, int64_t act2,
    std::optional<Tensor> grad_means, const Tensor& weight, const Tensor& x, const Tensor& expand,
    std::optional<Tensor> centre, const Tensor& mean1, const Tensor& var1, std::optional<Tensor> gamma1,
    std::optional<Tensor> beta1, double eps1, int64_t act1, int64_t stride, int64_t pad_top, int64_t pad_left,
    bool need_sums, bool need_x, bool need_expand, bool need_weight) {
  return backward(grad, scale, shift, y, mean2, var2, gamma2, beta2, eps2, act2, grad_means, weight, x, expand, centre,
                  mean1, var1, gamma1, beta1, eps1, act1, stride, pad_top, pad_left,
                  {need_sums, need_x, need_expand, need_weight});
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  m.impl("dwconv_backward.cpp", TORCH_BOX(&dwconv_backward));
  m.impl("expand_dwconv_gradients.cpp", TORCH_BOX(&expand_dwconv_gradients));
}

}  // namespace
}  // namespace effk
