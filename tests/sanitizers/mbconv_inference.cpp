#include "mbconv_inference/cpu_kernel.h"

#include "harness.h"

namespace effk::sanitized {

// Image by image, or phase by phase with a barrier between them.
static std::vector<Buffer> mbconv(MbconvParams p, const MbconvWeights& weights, bool whole, int threads) {
  const Dtype wide = compute_dtype(p.dtype);
  const Buffer packed(wide, EFFK_PRODUCT_FUNCTION(mbconv_packed_size, p.dtype)(p));
  const auto pack = EFFK_PRODUCT_FUNCTION(mbconv_pack, p.dtype);
  parallel_for(threads, EFFK_PRODUCT_FUNCTION(mbconv_pack_units, p.dtype)(p), wide, 0,
               [&](int64_t begin, int64_t end, void*) { pack(p, weights, packed.data(), begin, end); });
  p.packed = packed.data();
  EFFK_PRODUCT_FUNCTION(mbconv_plan, p.dtype)(p, whole ? 1 : 4);
  const Buffer y(p.dtype, p.x.n * p.out_c * p.out_h * p.out_w), shared(wide, whole ? 0 : p.x.n * p.image_size);
  p.y = y.data();
  const auto run = EFFK_PRODUCT_FUNCTION(mbconv_run, p.dtype);
  const auto units = EFFK_PRODUCT_FUNCTION(mbconv_units, p.dtype);
  const auto phase = [&](MbconvPhase phase) {
    parallel_for(threads, units(p, phase), wide, p.scratch_size, [&](int64_t begin, int64_t end, void* scratch) {
      const Buffer own(wide, whole ? p.image_size : 0);
      run(p, phase, begin, end, whole ? own.data() : shared.data(), scratch);
    });
  };
  if (whole) {
    phase(MbconvPhase::kWhole);
  } else {
    for (MbconvPhase shared_out : kSharedPhases) phase(shared_out);
  }
  return {y};
}

static const Cases cases([] {
  struct Shape {
    int64_t n, c, expand, h, w, out_c, squeezed;
  };
  constexpr Shape kShapes[] = {{3, 5, 6, 13, 15, 7, 2}, {1, 1, 1, 1, 1, 1, 0},      {2, 24, 6, 9, 7, 24, 6},
                               {4, 17, 1, 7, 1, 17, 4}, {1, 40, 3, 33, 20, 100, 0}, {5, 96, 4, 4, 4, 33, 24}};
  int number = 0;
  for (Dtype dtype : dtypes(/*products=*/true))
    for (Layout layout : kLayouts)
      for (int k : {3, 5, 7})
        for (int stride : {1, 2})
          for (const Shape& s : kShapes) {
            ++number;
            const int64_t hidden = s.c * s.expand;
            const RandomMap x(dtype, layout, s.n, s.c, s.h, s.w);
            const auto random = [&](int64_t count) { return Buffer::random(dtype, count); };
            const Buffer expand = random(hidden * s.c), depthwise = random(hidden * k * k);
            const Buffer project = random(s.out_c * hidden);
            const Buffer w1 = random(s.squeezed * hidden), b1 = random(s.squeezed);
            const Buffer w2 = random(hidden * s.squeezed), b2 = random(hidden);
            const RandomAffine norm1(dtype, hidden, true, true, kIdentity), norm2(dtype, hidden, true, true, kIdentity);
            const RandomAffine norm3(dtype, s.out_c, true, true, kIdentity);
            MbconvWeights weights{};
            weights.expand = expand.data();
            weights.expand_norm = norm1.affine;
            weights.depthwise = depthwise.data();
            weights.depthwise_norm = norm2.affine;
            weights.project = project.data();
            weights.project_norm = norm3.affine;
            weights.gate_dtype = dtype;
            weights.gate = {w1.data(), number % 2 ? b1.data() : nullptr, w2.data(), number % 3 ? b2.data() : nullptr};
            MbconvParams p{};
            p.dtype = dtype;
            p.x = x.map;
            p.channels_last = x.channels_last;
            p.hidden = hidden;
            p.out_c = s.out_c;
            p.has_expand = s.expand > 1;
            p.act1 = number % 5;
            p.act2 = number / 5 % 5;
            p.kernel_size = k;
            p.stride = stride;
            p.pad_top = p.pad_left = k / 2;
            p.out_h = (s.h - 1) / stride + 1;
            p.out_w = (s.w - 1) / stride + 1;
            p.squeezed = s.squeezed;
            p.squeeze_act = kSilu;
            p.gate = number % 2 ? kSigmoid : kHardsigmoid;
            p.residual = stride == 1 && s.c == s.out_c && number % 4;
            const std::string name = "mbconv " + std::to_string(number);
            for (bool whole : {true, false})
              check(name, [&](int threads) { return mbconv(p, weights, whole, threads); });
          }
});

}  // namespace effk::sanitized
