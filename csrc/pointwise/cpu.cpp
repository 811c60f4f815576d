// effkernels::pointwise.cpp and effkernels::pointwise_backward.cpp, the 1x1 convolution on the CPU.
#include "common/cpu_tensor.h"
#include "cpu_kernel.h"

namespace effk {
namespace {

template <class Params>
void pack_shared(void (*pack)(const Params&, int64_t, int64_t), const Params& p, int64_t depth, int64_t columns) {
  pack_in_units(pack_blocks(depth), depth * columns, [&](int64_t first, int64_t last) { pack(p, first, last); });
}

std::tuple<Tensor, Tensor> pointwise(const Tensor& x, const Tensor& weight, std::optional<Tensor> mean,
                                     std::optional<Tensor> var, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                                     double eps, int64_t act, std::optional<Tensor> gate, std::optional<Tensor> bias,
                                     std::optional<Tensor> residual, int64_t reduce) {
  const Dtype dtype = dtype_of(x);
  const Map map = map_of(x);
  require(weight.dim() == 2 && weight.size(1) == map.c && weight.scalar_type() == x.scalar_type(),
          "effkernels::pointwise: weight must be [O, C], of the dtype of x");
  const int64_t outputs = weight.size(0);
  const FoldedNorm prologue(mean, var, gamma, beta, eps, act, dtype, map.c);
  const Tensor matrix = torch::stable::contiguous(weight);
  const auto gates = dense_vector(gate, {map.n, map.c}, x, "effkernels::pointwise: gate");
  const auto biases = dense_vector(bias, {outputs}, x, "effkernels::pointwise: bias");
  const Tensor y = empty_map(x, {map.n, outputs, map.h, map.w}, is_channels_last(x));

  PointwiseParams p{};
  p.dtype = dtype;
  p.x = map;
  p.y = map_of(y);
  if (residual) p.residual = map_like(*residual, y, "effkernels::pointwise: residual");
  p.weight = matrix.const_data_ptr();
  p.prologue = prologue.affine();
  p.gate = data_of(gates);
  p.bias = data_of(biases);
  p.reduce = reduce_of(reduce);

  EFFK_PRODUCT_FUNCTION(pointwise_plan, p.dtype)(p);
  p.packed = scratch<0>(p.packed_size);
  std::vector<double> partials(p.reduce == Reduce::kNone ? 0 : map.n * p.bands * 2 * outputs);
  p.partials = partials.data();
  pack_shared(EFFK_PRODUCT_FUNCTION(pointwise_pack, p.dtype), p, map.c, outputs);
  const auto run = EFFK_PRODUCT_FUNCTION(pointwise_run, p.dtype);
  for_units(p.units, [&](int64_t begin, int64_t end) {
    run(p, begin, end, scratch<1>(p.scratch_size));
  });

  if (p.reduce == Reduce::kNone) return {y, empty_vector(x, 0, statistics_dtype(x))};
  const auto values = [&](int64_t band) {
    return static_cast<double>(std::min(p.band_pixels, map.h * map.w - band * p.band_pixels));
  };
  return {y, merge_partials(y, p.partials, p.bands, p.reduce, values)};
}

std::tuple<Tensor, Tensor, Tensor> pointwise_backward(
    const Tensor& grad, std::optional<Tensor> scale, const Tensor& y, const Tensor& mean2, const Tensor& var2,
    std::optional<Tensor> gamma2, double eps2, std::optional<Tensor> grad_means, const Tensor& weight, const Tensor& x,
    std::optional<Tensor> mean1, std::optional<Tensor> var1, std::optional<Tensor> gamma1, std::optional<Tensor> beta1,
    double eps1, int64_t act1, std::optional<Tensor> gate, bool need_input, bool need_weight) {
  const Dtype dtype = dtype_of(x);
  const Map map = map_of(x);
  const int64_t outputs = y.size(1);
  require(has_shape(weight, {outputs, map.c}) && weight.scalar_type() == x.scalar_type(),
          "effkernels::pointwise_backward: weight must be [O, C], of the dtype of x");
  require(has_shape(y, {map.n, outputs, map.h, map.w}) && y.scalar_type() == x.scalar_type(),
          "effkernels::pointwise_backward: y must be [N, O, H, W], of the dtype of x");
  const BackwardNormVectors after(mean2, var2, gamma2, std::nullopt, eps2, kIdentity, grad_means, dtype, outputs);
  const BackwardNormVectors before(mean1, var1, gamma1, beta1, eps1, act1, std::nullopt, dtype, map.c);
  const Tensor matrix = torch::stable::contiguous(weight);
  const auto scales = dense_vector(scale, {map.n, outputs}, x, "effkernels::pointwise_backward: scale");
  const auto gates = dense_vector(gate, {map.n, map.c}, x, "effkernels::pointwise_backward: gate");
  const ScalarType wide = statistics_dtype(x);
  const Tensor grad_gated =
      need_input ? empty_map(x, {map.n, map.c, map.h, map.w}, is_channels_last(x)) : empty_vector(x, 0, x.scalar_type());
  const Tensor grad_weight = need_weight ? empty_matrix(x, outputs, map.c, wide) : empty_vector(x, 0, wide);
  const bool need_sums = need_input && mean1;
  const int64_t sums_strides[] = {std::max<int64_t>(map.n, 1) * map.c, map.c, 1};
  const Tensor sums = need_sums ? empty_strided(x, {3, map.n, map.c}, sums_strides, wide) : empty_vector(x, 0, wide);

  PointwiseBackwardParams p{};
  p.dtype = dtype;
  p.grad = map_like(grad, y, "effkernels::pointwise_backward: grad");
  p.y = map_of(y);
  p.x = map;
  if (need_input) p.grad_gated = map_of(grad_gated);
  p.weight = matrix.const_data_ptr();
  p.scale = data_of(scales);
  p.after = after.vectors();
  p.before = before.vectors();
  p.gate = data_of(gates);
  p.need_weight = need_weight;

  EFFK_PRODUCT_FUNCTION(pointwise_backward_plan, p.dtype)(p);
  const size_t sums_size = map.n * p.image_tiles * 3 * map.c * compute_size(dtype);
  p.packed = scratch<0>(p.packed_size);
  if (need_sums) p.sums = scratch<2>(sums_size);
  p.products = scratch<3>(p.products_size);
  if (need_input) pack_shared(EFFK_PRODUCT_FUNCTION(pointwise_backward_pack, p.dtype), p, outputs, map.c);
  const auto run = EFFK_PRODUCT_FUNCTION(pointwise_backward_run, p.dtype);
  for_units(p.units, [&](int64_t begin, int64_t end) {
    run(p, begin, end, scratch<1>(p.scratch_size));
  });

  with_compute(dtype, [&](auto zero) {
    using C = decltype(zero);
    const int64_t c = map.c;
    if (need_sums)
      merge_parts({p.sums, map.n, p.image_tiles, 3, c, c}, static_cast<C*>(sums.mutable_data_ptr()), c, sums_strides[0], 1,
                  [&](int64_t row, int64_t channel, double sum) { return row == 2 ? sum * before.rstd()[channel] : sum; });
    if (need_weight)
      merge_parts({p.products, 1, p.parts, outputs, p.padded, c}, static_cast<C*>(grad_weight.mutable_data_ptr()), 0, c, 1,
                  [](int64_t, int64_t, double sum) { return sum; });
  });
  return {grad_gated, sums, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  m.impl("pointwise.cpp", TORCH_BOX(&pointwise));
  m.impl("pointwise_backward.cpp", TORCH_BOX(&pointwise_backward));
}

}  // namespace
}  // namespace effk
