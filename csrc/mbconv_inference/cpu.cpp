// effkernels::mbconv_inference.cpp, and the same in two steps: mbconv_pack.cpp, once, and mbconv_packed.cpp.
#include "cpu_kernel.h"
#include "cpu_tensor.h"
#include "mbconv_inference/parameters.h"

namespace effk {
namespace {

using Optional = std::optional<Tensor>;

// The sizes of a block that do not depend on x, and the dtype.
MbconvParams block_params(Dtype dtype, int64_t c, int64_t hidden, int64_t out_c, bool has_expand, int64_t kernel_size,
                          int64_t act1, int64_t act2, int64_t squeezed, int64_t squeeze_act, int64_t gate) {
  require(kernel_size == 3 || kernel_size == 5 || kernel_size == 7, "effkernels::mbconv: the kernel size must be 3, 5 or 7");
  require(has_expand || hidden == c, "effkernels::mbconv: without an expand convolution, hidden must be C");
  MbconvParams p{};
  p.dtype = dtype;
  p.x.c = c;
  p.hidden = hidden;
  p.out_c = out_c;
  p.has_expand = has_expand;
  p.act1 = static_cast<int32_t>(act1);
  p.act2 = static_cast<int32_t>(act2);
  p.kernel_size = static_cast<int32_t>(kernel_size);
  p.squeezed = squeezed;
  p.squeeze_act = static_cast<int32_t>(squeeze_act);
  p.gate = static_cast<int32_t>(gate);
  return p;
}

// A block's parameters, checked, and its weights, dense.
class Block {
 public:
  MbconvParams params;

  explicit Block(EFFK_BLOCK_PARAMETERS) {
    const Dtype dtype = dtype_of(depthwise);
    const int64_t hidden = depthwise.size(0), k = depthwise.size(2), out_c = project.size(0);
    const int64_t c = expand ? expand->size(1) : hidden, squeezed = w1 ? w1->size(0) : 0;
    params = block_params(dtype, c, hidden, out_c, expand.has_value(), k, act1, act2, squeezed, squeeze_act, gate);
    require(has_shape(depthwise, {hidden, 1, k, k}), "effkernels::mbconv: depthwise must be [hidden, 1, k, k]");
    require(!expand || has_shape(*expand, {hidden, c, 1, 1}), "effkernels::mbconv: expand must be [hidden, C, 1, 1]");
    require(has_shape(project, {out_c, hidden, 1, 1}), "effkernels::mbconv: project must be [out, hidden, 1, 1]");
    require((!expand || dtype_of(*expand) == dtype) && dtype_of(project) == dtype,
            "effkernels::mbconv: the convolutions must have one dtype");
    weights_.gate_dtype = dtype;
    if (w1) {
      weights_.gate_dtype = dtype_of(*w1);
      require(w2 && has_shape(*w1, {squeezed, hidden, 1, 1}) && has_shape(*w2, {hidden, squeezed, 1, 1}) &&
                  (!b1 || has_shape(*b1, {squeezed})) && (!b2 || has_shape(*b2, {hidden})),
              "effkernels::mbconv: w1 must be [R, hidden, 1, 1], b1 [R], w2 [hidden, R, 1, 1], b2 [hidden]");
      for (const Optional* t : {&b1, &w2, &b2})
        require(!*t || (*t)->scalar_type() == w1->scalar_type(), "effkernels::mbconv: the gate's weights must have one dtype");
      require(compute_size(weights_.gate_dtype) == compute_size(dtype),
              "effkernels::mbconv: the gate's weights must be float64 where the convolutions are, and only there");
    }
    weights_.gate = {dense(w1), dense(b1), dense(w2), dense(b2)};
    weights_.expand = dense(expand);
    weights_.depthwise = dense(depthwise);
    weights_.project = dense(project);
    if (expand) weights_.expand_norm = fold(mean1, var1, gamma1, beta1, eps1, dtype, hidden);
    weights_.depthwise_norm = fold(mean2, var2, gamma2, beta2, eps2, dtype, hidden);
    weights_.project_norm = fold(mean3, var3, gamma3, beta3, eps3, dtype, out_c);
  }

  int64_t packed_size() const { return EFFK_PRODUCT_FUNCTION(mbconv_packed_size, params.dtype)(params); }
  void pack(void* packed) const {
    const auto pack = EFFK_PRODUCT_FUNCTION(mbconv_pack, params.dtype);
    pack_in_units(EFFK_PRODUCT_FUNCTION(mbconv_pack_units, params.dtype)(params), packed_size(),
                  [&](int64_t first, int64_t last) { pack(params, weights_, packed, first, last); });
  }

 private:
  const void* dense(const Optional& t) {
    if (!t) return nullptr;
    kept_.push_back(torch::stable::contiguous(*t));  // small, and the same tensor where it is dense already
    return kept_.back().const_data_ptr();
  }

  Affine fold(const Optional& mean, const Optional& var, const Optional& gamma, const Optional& beta, double eps,
              Dtype dtype, int64_t channels) {
    norms_.emplace_back(mean, var, gamma, beta, eps, kIdentity, dtype, channels);
    return norms_.back().affine();
  }

  MbconvWeights weights_{};
  std::vector<Tensor> kept_;
  std::vector<FoldedNorm> norms_;
};

Tensor run(MbconvParams p, const void* packed, const Tensor& x, int64_t stride, int64_t pad_top, int64_t pad_left,
           int64_t out_h, int64_t out_w, bool residual) {
  require(dtype_of(x) == p.dtype && x.size(1) == p.x.c, "effkernels::mbconv: x must have the weights' dtype and channels");
  require(stride == 1 || stride == 2, "effkernels::mbconv: stride must be 1 or 2");
  require(pad_top >= 0 && pad_left >= 0 && out_h > 0 && out_w > 0,
          "effkernels::mbconv: padding must not be negative, the output not empty");
  require(!residual || (p.out_c == x.size(1) && out_h == x.size(2) && out_w == x.size(3)),
          "effkernels::mbconv: a shortcut needs an output of the shape of x");
  p.packed = packed;
  p.x = map_of(x);
  p.stride = static_cast<int32_t>(stride);
  p.pad_top = pad_top;
  p.pad_left = pad_left;
  p.out_h = out_h;
  p.out_w = out_w;
  p.residual = residual;
  p.channels_last = is_channels_last(x);
  const int64_t n = x.size(0);
  const Tensor y = empty_map(x, {n, p.out_c, out_h, out_w}, p.channels_last);
  p.y = y.mutable_data_ptr();

  // Whole images need no barrier, and each thread finds in its cache what it wrote. A few that do not divide are shared.
  const int64_t threads = torch::stable::get_num_threads();
  const bool whole = n % threads == 0 || n >= 8 * threads;
  EFFK_PRODUCT_FUNCTION(mbconv_plan, p.dtype)(p, whole ? 1 : threads);
  const size_t element = compute_size(p.dtype);
  const auto units = EFFK_PRODUCT_FUNCTION(mbconv_units, p.dtype);
  const auto kernel = EFFK_PRODUCT_FUNCTION(mbconv_run, p.dtype);
  void* shared = whole ? nullptr : scratch<2>(n * p.image_size * element);
  auto phase = [&](MbconvPhase phase) {
    torch::stable::parallel_for(0, units(p, phase), 1, [&](int64_t begin, int64_t end) {
      void* images = whole ? scratch<2>(p.image_size * element) : shared;
      kernel(p, phase, begin, end, images, scratch<1>(p.scratch_size * element));
    });
  };
  if (whole) {
    phase(MbconvPhase::kWhole);
  } else {
    for (MbconvPhase shared_out : kSharedPhases) phase(shared_out);
  }
  return y;
}

Tensor mbconv_inference(const Tensor& x, EFFK_BLOCK_PARAMETERS, int64_t stride, int64_t pad_top, int64_t pad_left,
                        int64_t out_h, int64_t out_w, bool residual) {
  const Block block(EFFK_BLOCK_ARGUMENTS);
  void* packed = scratch<0>(block.packed_size() * compute_size(block.params.dtype));
  block.pack(packed);
  return run(block.params, packed, x, stride, pad_top, pad_left, out_h, out_w, residual);
}

Tensor mbconv_pack(EFFK_BLOCK_PARAMETERS) {
  const Block block(EFFK_BLOCK_ARGUMENTS);
  const Tensor packed = empty_vector(depthwise, block.packed_size(), statistics_dtype(depthwise));
  block.pack(packed.mutable_data_ptr());
  return packed;
}

Tensor mbconv_packed(const Tensor& x, const Tensor& packed, int64_t hidden, int64_t out_c, bool has_expand,
                     int64_t kernel_size, int64_t act1, int64_t act2, int64_t squeezed, int64_t squeeze_act,
                     int64_t gate, int64_t stride, int64_t pad_top, int64_t pad_left, int64_t out_h, int64_t out_w,
                     bool residual) {
  const MbconvParams params = block_params(dtype_of(x), x.size(1), hidden, out_c, has_expand, kernel_size, act1, act2,
                                           squeezed, squeeze_act, gate);
  require(packed.scalar_type() == statistics_dtype(x) &&
              has_shape(packed, {EFFK_PRODUCT_FUNCTION(mbconv_packed_size, params.dtype)(params)}),
          "effkernels::mbconv_packed: packed must come from mbconv_pack on this CPU, with weights of the dtype of x");
  return run(params, packed.const_data_ptr(), x, stride, pad_top, pad_left, out_h, out_w, residual);
}

STABLE_TORCH_LIBRARY_IMPL(effkernels, CPU, m) {
  m.impl("mbconv_inference.cpp", TORCH_BOX(&mbconv_inference));
  m.impl("mbconv_pack.cpp", TORCH_BOX(&mbconv_pack));
  m.impl("mbconv_packed.cpp", TORCH_BOX(&mbconv_packed));
}

}  // namespace
}  // namespace effk
