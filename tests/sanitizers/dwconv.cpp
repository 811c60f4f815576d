#include "dwconv/cpu_kernel.h"

#include "harness.h"

namespace effk::sanitized {

static std::vector<Buffer> dwconv(DwconvParams p, int threads) {
  const Dtype wide = compute_dtype(p.dtype);
  EFFK_PRODUCT_FUNCTION(dwconv_plan, p.dtype)(p);
  const Buffer y(p.dtype, p.x.n * p.x.c * p.out_h * p.out_w), packed(wide, p.packed_size);
  const Buffer partials(Dtype::kFloat64, p.reduce == Reduce::kNone ? 0 : p.x.n * p.bands * 2 * p.x.c);
  p.y = y.data();
  p.packed = packed.data();
  p.partials = static_cast<double*>(partials.data());
  EFFK_PRODUCT_FUNCTION(dwconv_pack, p.dtype)(p);
  const auto run = EFFK_PRODUCT_FUNCTION(dwconv_run, p.dtype);
  parallel_for(threads, p.units, wide, p.scratch_size,
               [&](int64_t begin, int64_t end, void* scratch) { run(p, begin, end, scratch); });
  return {y, partials};
}

constexpr int64_t kExpanded = 19;  // channels of x where it is expanded

static const Cases cases([] {
  struct Shape {
    int64_t n, c, h, w;
  };
  // Lanes that are not filled, chunks of channels, bands of rows, columns in several vectors, a single pixel.
  constexpr Shape kShapes[] = {{3, 17, 13, 15}, {1, 1, 1, 1},   {2, 3, 1, 7},   {1, 2, 7, 1},
                               {1, 129, 5, 6},  {1, 3, 61, 75}, {1, 70, 9, 33}, {2, 16, 8, 16}};
  int number = 0;
  for (Dtype dtype : dtypes(/*products=*/true))
    for (Layout layout : kLayouts)
      for (int k : {3, 5, 7})
        for (int stride : {1, 2})
          for (const Shape& s : kShapes) {
            const int pads[] = {k / 2, 0, 4}, pad = pads[++number % 3];
            const bool expands = number % 4 == 0;
            const RandomMap x(dtype, layout, s.n, expands ? kExpanded : s.c, s.h, s.w);
            const Buffer expand = Buffer::random(dtype, s.c * kExpanded), weight = Buffer::random(dtype, s.c * k * k);
            const RandomAffine prologue(dtype, s.c, number % 2, number % 3, number % 7);
            const RandomAffine epilogue(dtype, s.c, number % 3, number % 2, number / 7 % 7);
            DwconvParams p{};
            p.dtype = dtype;
            p.x = expands ? Map{nullptr, s.n, s.c, s.h, s.w, 0, 0, 0, 0} : x.map;
            if (expands) p.expand = {x.map, expand.data()};
            p.weight = weight.data();
            p.kernel_size = k;
            p.stride = stride;
            p.pad_top = p.pad_left = pad;
            p.prologue = prologue.affine;
            p.epilogue = epilogue.affine;
            p.channels_last = expands || x.channels_last;
            p.out_h = std::max<int64_t>((s.h + 2 * pad - k) / stride + 1, 1);
            p.out_w = std::max<int64_t>((s.w + 2 * pad - k) / stride + 1, 1);
            p.reduce = kReductions[number % 5 % 3];
            check("dwconv " + std::to_string(number), [&](int threads) { return dwconv(p, threads); });
          }
});

}  // namespace effk::sanitized
