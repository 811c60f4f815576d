#include "map_pass/cpu_kernel.h"

#include "harness.h"

namespace effk::sanitized {

static std::vector<Buffer> map_pass(MapPassParams p, bool stores, int threads) {
  EFFK_CPU_FUNCTION(map_pass_plan)(p);
  const Buffer y(p.dtype, stores ? p.x.n * p.x.c * p.x.h * p.x.w : 0);
  const Buffer partials(Dtype::kFloat64, p.reduce == Reduce::kNone ? 0 : p.x.n * p.bands * 2 * p.x.c);
  p.y = stores ? y.data() : nullptr;
  p.partials = static_cast<double*>(partials.data());
  const auto run = EFFK_CPU_FUNCTION(map_pass_run);
  const int64_t scratch_size = p.scratch_size / static_cast<int64_t>(sizeof(double));
  parallel_for(threads, p.units, Dtype::kFloat64, scratch_size,
               [&](int64_t begin, int64_t end, void* scratch) { run(p, begin, end, scratch); });
  return {y, partials};
}

static const Cases cases([] {
  struct Shape {
    int64_t n, c, h, w;
  };
  constexpr Shape kShapes[] = {{3, 17, 13, 15}, {1, 1, 1, 1},    {2, 3, 1, 7},   {1, 2, 7, 1},
                               {2, 129, 5, 6},  {1, 16, 61, 75}, {1, 600, 3, 2}, {1, 33, 64, 64}};
  int number = 0;
  for (Dtype dtype : dtypes(/*products=*/false))
    for (Layout layout : kLayouts)
      for (Reduce reduce : kReductions)
        for (const Shape& s : kShapes) {
          ++number;
          const bool per_image = number % 2, stores = reduce == Reduce::kNone || number % 3;
          const RandomMap x(dtype, layout, s.n, s.c, s.h, s.w);
          const RandomAffine affine(dtype, s.c, per_image || number % 5, number % 3, number % 7, per_image ? s.n : 1);
          MapPassParams p{};
          p.dtype = dtype;
          p.x = x.map;
          p.affine = affine.affine;
          p.image_stride = per_image ? s.c : 0;
          p.channels_last = x.channels_last;
          p.reduce = reduce;
          check("map_pass " + std::to_string(number), [&](int threads) { return map_pass(p, stores, threads); });
        }
});

}  // namespace effk::sanitized
