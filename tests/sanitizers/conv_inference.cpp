#include "conv_inference/cpu_kernel.h"

#include "harness.h"

namespace effk::sanitized {

static std::vector<Buffer> conv(ConvParams p, const Buffer& weight, const Affine& norm, int threads) {
  const Dtype wide = compute_dtype(p.dtype);
  const Buffer packed(wide, EFFK_PRODUCT_FUNCTION(conv_packed_size, p.dtype)(p));
  const int64_t taps = p.kernel_h * p.kernel_w;
  const ConvWeight dense{weight.data(), p.x.c * taps, taps, p.kernel_w, 1};
  const auto pack = EFFK_PRODUCT_FUNCTION(conv_pack, p.dtype);
  parallel_for(threads, EFFK_PRODUCT_FUNCTION(conv_pack_units, p.dtype)(p), wide, 0,
               [&](int64_t begin, int64_t end, void*) { pack(p, dense, norm, packed.data(), begin, end); });
  p.packed = packed.data();
  const Buffer y(p.dtype, p.x.n * p.out_c * p.out_h * p.out_w);
  p.y = y.data();
  EFFK_PRODUCT_FUNCTION(conv_plan, p.dtype)(p, 4);
  const auto run = EFFK_PRODUCT_FUNCTION(conv_run, p.dtype);
  parallel_for(threads, p.units, wide, p.scratch_size,
               [&](int64_t begin, int64_t end, void* scratch) { run(p, begin, end, scratch); });
  return {y};
}

static const Cases cases([] {
  struct Shape {
    int64_t n, c, out_c, h, w;
  };
  constexpr Shape kShapes[] = {{2, 3, 32, 13, 15}, {1, 1, 1, 1, 1}, {3, 17, 40, 9, 7}, {1, 24, 100, 21, 20}};
  int number = 0;
  for (Dtype dtype : dtypes(/*products=*/true))
    for (Layout layout : kLayouts)
      for (int k : {1, 3, 5})
        for (int stride : {1, 2})
          for (const Shape& s : kShapes) {
            ++number;
            const int64_t out_h = (s.h - 1) / stride + 1, out_w = (s.w - 1) / stride + 1;
            const RandomMap x(dtype, layout, s.n, s.c, s.h, s.w);
            const RandomMap shortcut(dtype, kLayouts[number % 4], s.n, s.out_c, out_h, out_w);
            const Buffer weight = Buffer::random(dtype, s.out_c * s.c * k * k);
            const RandomAffine norm(dtype, s.out_c, true, true, kIdentity);
            ConvParams p{};
            p.dtype = dtype;
            p.x = x.map;
            p.out_c = s.out_c;
            p.out_h = out_h;
            p.out_w = out_w;
            p.kernel_h = p.kernel_w = k;
            p.stride = stride;
            p.pad_top = p.pad_left = k / 2;
            p.activation = number % 7;
            p.channels_last = x.channels_last;
            p.has_shortcut = number % 2;
            p.shortcut = shortcut.map;
            check("conv " + std::to_string(number), [&](int threads) { return conv(p, weight, norm.affine, threads); });
          }
});

}  // namespace effk::sanitized
