#include "dwconv_backward/cpu_kernel.h"

#include "harness.h"

namespace effk::sanitized {

static std::vector<Buffer> backward(DwconvBackwardParams p, bool channels_last, bool need_input, int threads) {
  const Dtype wide = compute_dtype(p.dtype);
  const Map& x = p.x;
  const int64_t channels = p.expand.x.data ? p.expand.x.c : x.c;
  const Buffer grad_x(p.dtype, need_input ? x.n * channels * x.h * x.w : 0);
  if (need_input)
    (p.expand.x.data ? p.grad_x : p.grad_norm) = output_map(grad_x, channels_last, x.n, channels, x.h, x.w);
  EFFK_PRODUCT_FUNCTION(dwconv_backward_plan, p.dtype)(p);
  const Buffer packed = Buffer::of_bytes(wide, p.packed_size), products = Buffer::of_bytes(wide, p.products_size);
  const Buffer sums(wide, need_input ? x.n * p.bands * 2 * p.padded : 0);
  p.packed = packed.data();
  p.products = products.data();
  if (need_input) p.sums = sums.data();
  const bool need_expand = p.expand.x.data && p.need_weight;
  const Buffer expand_products = Buffer::of_bytes(wide, need_expand ? p.expand_products_size : 0);
  if (need_expand) p.expand_products = expand_products.data();
  EFFK_PRODUCT_FUNCTION(dwconv_backward_pack, p.dtype)(p);
  const auto run = EFFK_PRODUCT_FUNCTION(dwconv_backward_run, p.dtype);
  parallel_for(threads, p.units, wide, p.scratch_size / static_cast<int64_t>(size_of(wide)),
               [&](int64_t begin, int64_t end, void* scratch) { run(p, begin, end, scratch); });
  return {grad_x, products, sums, expand_products};
}

constexpr int64_t kExpanded = 19;  // channels of x where it is expanded

static const Cases cases([] {
  struct Shape {
    int64_t n, c, h, w;
  };
  constexpr Shape kShapes[] = {{3, 17, 13, 15}, {1, 1, 1, 1}, {2, 3, 1, 7}, {1, 129, 5, 6}, {1, 24, 41, 33}};
  int number = 0;
  for (Dtype dtype : dtypes(/*products=*/true))
    for (Layout layout : kLayouts)
      for (int k : {3, 5, 7})
        for (int stride : {1, 2})
          for (const Shape& s : kShapes) {
            const int pads[] = {k / 2, k / 2 + 1, 4}, pad = pads[++number % 3];
            const int64_t out_h = (s.h + 2 * pad - k) / stride + 1, out_w = (s.w + 2 * pad - k) / stride + 1;
            const bool expands = number % 4 == 0;
            const RandomMap x(dtype, layout, s.n, expands ? kExpanded : s.c, s.h, s.w);
            const Buffer expand = Buffer::random(dtype, s.c * kExpanded);
            const Buffer centre = Buffer::random(compute_dtype(dtype), kExpanded);
            const RandomMap grad(dtype, layout, s.n, s.c, out_h, out_w), y(dtype, layout, s.n, s.c, out_h, out_w);
            const Buffer weight = Buffer::random(dtype, s.c * k * k);
            const Buffer vectors = Buffer::random(compute_dtype(dtype), s.n * s.c);
            const RandomNorm after(dtype, s.c, number % 2, number % 7), before(dtype, s.c, true, number / 7 % 7);
            DwconvBackwardParams p{};
            p.dtype = dtype;
            p.grad = grad.map;
            p.y = y.map;
            p.x = expands ? Map{nullptr, s.n, s.c, s.h, s.w, 0, 0, 0, 0} : x.map;
            if (expands) p.expand = {x.map, expand.data()};
            p.centre = number % 3 ? centre.data() : nullptr;
            p.weight = weight.data();
            p.kernel_size = k;
            p.stride = stride;
            p.pad_top = p.pad_left = pad;
            p.scale = number % 3 ? vectors.data() : nullptr;
            p.shift = number % 3 ? vectors.data() : nullptr;
            p.after = after.norm;
            p.before = before.norm;
            p.need_weight = number % 5 != 0;
            check("dwconv_backward " + std::to_string(number), [&](int threads) {
              return backward(p, x.channels_last, number % 5 != 1, threads);
            });
          }
});

}  // namespace effk::sanitized
