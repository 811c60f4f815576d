#include "pointwise/cpu_kernel.h"

#include "harness.h"

namespace effk::sanitized {

static std::vector<Buffer> forward(PointwiseParams p, bool channels_last, int64_t outputs, int threads) {
  const Dtype wide = compute_dtype(p.dtype);
  const Buffer y(p.dtype, p.x.n * outputs * p.x.h * p.x.w);
  p.y = output_map(y, channels_last, p.x.n, outputs, p.x.h, p.x.w);
  EFFK_PRODUCT_FUNCTION(pointwise_plan, p.dtype)(p);
  const Buffer packed = Buffer::of_bytes(wide, p.packed_size);
  const Buffer partials(Dtype::kFloat64, p.reduce == Reduce::kNone ? 0 : p.x.n * p.bands * 2 * outputs);
  p.packed = packed.data();
  p.partials = static_cast<double*>(partials.data());
  const auto pack = EFFK_PRODUCT_FUNCTION(pointwise_pack, p.dtype);
  parallel_for(threads, pack_blocks(p.x.c), wide, 0, [&](int64_t begin, int64_t end, void*) { pack(p, begin, end); });
  const auto run = EFFK_PRODUCT_FUNCTION(pointwise_run, p.dtype);
  parallel_for(threads, p.units, wide, p.scratch_size / static_cast<int64_t>(size_of(wide)),
               [&](int64_t begin, int64_t end, void* scratch) { run(p, begin, end, scratch); });
  return {y, partials};
}

static std::vector<Buffer> backward(PointwiseBackwardParams p, bool channels_last, bool need_input, bool need_sums,
                                    int threads) {
  const Dtype wide = compute_dtype(p.dtype);
  const Map& x = p.x;
  const Buffer grad_gated(p.dtype, need_input ? x.n * x.c * x.h * x.w : 0);
  if (need_input) p.grad_gated = output_map(grad_gated, channels_last, x.n, x.c, x.h, x.w);
  EFFK_PRODUCT_FUNCTION(pointwise_backward_plan, p.dtype)(p);
  const Buffer packed = Buffer::of_bytes(wide, p.packed_size), products = Buffer::of_bytes(wide, p.products_size);
  const Buffer sums(wide, need_sums ? x.n * p.image_tiles * 3 * x.c : 0);
  p.packed = packed.data();
  p.sums = need_sums ? sums.data() : nullptr;
  p.products = products.data();
  const auto pack = EFFK_PRODUCT_FUNCTION(pointwise_backward_pack, p.dtype);
  if (need_input)
    parallel_for(threads, pack_blocks(p.y.c), wide, 0, [&](int64_t begin, int64_t end, void*) { pack(p, begin, end); });
  const auto run = EFFK_PRODUCT_FUNCTION(pointwise_backward_run, p.dtype);
  parallel_for(threads, p.units, wide, p.scratch_size / static_cast<int64_t>(size_of(wide)),
               [&](int64_t begin, int64_t end, void* scratch) { run(p, begin, end, scratch); });
  return {grad_gated, sums, products};
}

static const Cases cases([] {
  struct Shape {
    int64_t n, c, out_c, h, w;
  };
  // Vectors and panels that are not filled, several of them, bands of pixels, a single pixel.
  constexpr Shape kShapes[] = {{3, 17, 19, 13, 15}, {1, 1, 1, 1, 1},    {2, 3, 40, 1, 7},
                               {2, 129, 24, 5, 6},  {1, 24, 96, 31, 33}, {1, 300, 70, 3, 2}};
  int number = 0;
  for (Dtype dtype : dtypes(/*products=*/true))
    for (Layout layout : kLayouts)
      for (int variant = 0; variant < 3; ++variant)
        for (const Shape& s : kShapes) {
          ++number;
          const Dtype wide = compute_dtype(dtype);
          const RandomMap x(dtype, layout, s.n, s.c, s.h, s.w);
          const RandomMap grad(dtype, layout, s.n, s.out_c, s.h, s.w), y(dtype, layout, s.n, s.out_c, s.h, s.w);
          const Buffer weight = Buffer::random(dtype, s.out_c * s.c), bias = Buffer::random(wide, s.out_c);
          const Buffer gate = Buffer::random(wide, s.n * s.c), scale = Buffer::random(wide, s.n * s.out_c);
          const RandomAffine prologue(dtype, s.c, number % 2, number % 3, number % 7);
          const RandomNorm after(dtype, s.out_c, number % 2, kIdentity), before(dtype, s.c, true, number % 7);
          PointwiseParams p{};
          p.dtype = dtype;
          p.x = x.map;
          if (number % 2) p.residual = y.map;
          p.weight = weight.data();
          p.prologue = prologue.affine;
          p.gate = number % 3 ? gate.data() : nullptr;
          p.bias = number % 5 ? bias.data() : nullptr;
          p.reduce = kReductions[variant];
          const std::string name = std::to_string(number);
          check("pointwise " + name, [&](int threads) { return forward(p, x.channels_last, s.out_c, threads); });
          PointwiseBackwardParams b{};
          b.dtype = dtype;
          b.grad = grad.map;
          b.y = y.map;
          b.x = x.map;
          b.weight = weight.data();
          b.scale = number % 3 ? scale.data() : nullptr;
          b.after = after.norm;
          b.before = before.norm;
          b.gate = number % 2 ? gate.data() : nullptr;
          b.need_weight = variant != 1;
          const bool need_input = variant != 2, need_sums = need_input && number % 3;
          check("pointwise_backward " + name,
                [&](int threads) { return backward(b, x.channels_last, need_input, need_sums, threads); });
        }
});

}  // namespace effk::sanitized
