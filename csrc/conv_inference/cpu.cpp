// effkernels::conv_inference.cpp, and the same in two steps: conv_pack.cpp, once, and conv_packed.cpp.
#include "cpu_kernel.h"
#include "cpu_tensor.h"

namespace effk {
namespace {

using Optional = std::optional<Tensor>;

ConvParams conv_params(Dtype dtype, int64_t out_c, int64_t c, int64_t kernel_h, int64_t kernel_w, int64_t stride) {
  ConvParams p{};
  p.dtype = dtype;
  p.x.c = c;
  p.out_c = out_c;
  p.kernel_h = kernel_h;
  p.kernel_w = kernel_w;
  p.stride = stride;
  return p;
}

void pack(const ConvParams& p, const Tensor& weight, const Optional& mean, const Optional& var, const Optional& gamma,
          const Optional& beta, double eps, void* packed) {
  const ConvWeight w{weight.const_data_ptr(), weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const FoldedNorm norm(mean, var, gamma, beta, eps, kIdentity, p.dtype, p.out_c);
  const auto pack = EFFK_PRODUCT_FUNCTION(conv_pack, p.dtype);
  pack_in_units(EFFK_PRODUCT_FUNCTION(conv_pack_units, p.dtype)(p), EFFK_PRODUCT_FUNCTION(conv_packed_size, p.dtype)(p),
                [&](int64_t first, int64_t last) { pack(p, w, norm.affine(), packed, first, last); });
}

ConvParams params_of(const Tensor& weight, int64_t stride) {
  require(weight.dim() == 4, "effkernels::conv_inference: weight must be [out, C, k, k]");
  return conv_params(dtype_of(weight), weight.size(0), weight.size(1), weight.size(2), weight.size(3), stride);
}

Tensor run(ConvParams p, const void* packed, const Tensor& x, const Optional& shortcut, int64_t act, int64_t pad_top,
           int64_t pad_left, int64_t out_h, int64_t out_w) {
  require(dtype_of(x) == p.dtype && x.size(1) == p.x.c,
          "effkernels::conv_inference: x must have the weight's dtype and channels");
  require(p.stride > 0 && pad_top >= 0 && pad_left >= 0 && out_h > 0 && out_w > 0,
          "effkernels::conv_inference: padding must not be negative, stride and output not empty");
  const int64_t n = x.size(0);
  require(!shortcut || (dtype_of(*shortcut) == p.dtype && has_shape(*shortcut, {n, p.out_c, out_h, out_w})),
          "effkernels::conv_inference: shortcut must have the dtype of x and the shape of the output");
  p.x = map_of(x);
  p.has_shortcut = shortcut.has_value();
  if (shortcut) p.shortcut = map_of(*shortcut);
  p.activation = static_cast<int32_t>(act);
  p.pad_top = pad_top;
  p.pad_left = pad_left;
  p.out_h = out_h;
  p.out_w = out_w;
  p.packed = packed;
  p.channels_last = is_channels_last(x);
  const Tensor y = empty_map(x, {n, p.out_c, out_h, out_w}, p.channels_last);
  p.y = y.mutable_data_ptr();
  EFFK_PRODUCT_FUNCTION(conv_plan, p.dtype)(p, torch::stable::get_num_threads());
  const auto kernel = EFFK_PRODUCT_FUNCTION(conv_run, p.dtype);
  torch::stable::parallel_for(0, p.units, 1, [&](int64_t begin, int64_t end) {
    kernel(p, begin, end, scratch<1>(p.scratch_size * compute_size(p.dtype)));
  });
  return y;
}

Tensor conv_inference(const Tensor& x, const Tensor& weight, Optional mean, Optional var, Optional gamma, Optional beta,
                      double eps, Optional shortcut, int64_t act, int64_t stride, int64_t pad_top, int64_t pad_left,
                      int64_t out_h, int64_t out_w) {
  const ConvParams p = params_of(weight, stride);
  void* packed = scratch<0>(EFFK_PRODUCT_FUNCTION(conv_packed_size, p.dtype)(p) * compute_size(p.dtype));
  pack(p, weight, mean, var, gamma, beta, eps, packed);
  return run(p, packed, x, shortcut, act, pad_top, pad_left, out_h, out_w);
}

Tensor conv_pack(const Tensor& weight, Optional mean, Optional var, Optional gamma, Optional beta, double eps,
                 int64_t stride) {
  const ConvParams p = params_of(weight, stride);
  const Tensor packed = empty_vector(weight, EFFK_PRODUCT_FUNCTION(conv_packed_size, p.dtype)(p), statistics_dtype(weight));
  pack(p, weight, mean, var, gamma, beta, eps, packed.mutable_data_ptr());
  return packed;
}

Tensor conv_packed(const Tensor& x, const Tensor& packed, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                   Optional shortcut, int64_t act, int64_t stride, int64_t pad_top, int64_t pad_left, int64_t out_h,
                   int64_t out_w) {
  const ConvParams p = conv_params(dtype_of(x), out_channels, x.size(1), kernel_h, kernel_w, stride);
  require(packed.scalar_type() == statistics_dtype(x) && has_shape(packed, {EFFK_PRODUCT_FUNCTION(conv_packed_size, p.dtype)(p)}),
          "effkernels::conv_packed: packed must come from conv_pack on this CPU, with a weight of the dtype of x and the stride");
  return run(p, packed.const_data_ptr(), x, shortcut, act, pad_top, pad_left, out_h, out_w);
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  m.impl("conv_inference.cpp", TORCH_BOX(&conv_inference));
  m.impl("conv_pack.cpp", TORCH_BOX(&conv_pack));
  m.impl("conv_packed.cpp", TORCH_BOX(&conv_packed));
}

}  // namespace
}  // namespace effk
