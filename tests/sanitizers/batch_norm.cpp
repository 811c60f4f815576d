#include "batch_norm/cpu_kernel.h"

#include "harness.h"

namespace effk::sanitized {

static std::vector<Buffer> norm_pass(NormPassParams p, bool channels_last, int threads) {
  EFFK_CPU_FUNCTION(norm_pass_plan)(p);
  const Dtype wide = compute_dtype(p.dtype);
  const bool stores = p.kind == NormPassParams::kBackward || p.kind == NormPassParams::kResidual;
  const Buffer y(p.dtype, stores ? p.x.n * p.x.c * p.x.h * p.x.w : 0);
  const Buffer sums(wide, p.units * p.sums_count * p.padded);
  if (stores) p.y = output_map(y, channels_last, p.x.n, p.x.c, p.x.h, p.x.w);
  p.sums = sums.data();
  const auto run = EFFK_CPU_FUNCTION(norm_pass_run);
  const int64_t scratch_size = p.scratch_size / static_cast<int64_t>(size_of(wide));
  parallel_for(threads, p.units, wide, scratch_size,
               [&](int64_t begin, int64_t end, void* scratch) { run(p, begin, end, scratch); });
  return {y, sums};
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
      for (auto kind : {NormPassParams::kPool, NormPassParams::kPoolOnly, NormPassParams::kBackwardSums,
                        NormPassParams::kBackward, NormPassParams::kResidual})
        for (const Shape& s : kShapes) {
          ++number;
          const bool residual = kind == NormPassParams::kResidual, gradient = kind == NormPassParams::kBackward;
          const bool backward = gradient || kind == NormPassParams::kBackwardSums;
          const RandomMap x(dtype, layout, s.n, s.c, s.h, s.w), other(dtype, layout, s.n, s.c, s.h, s.w);
          const RandomNorm norm(dtype, s.c, !gradient || number % 2, residual ? kIdentity : number % 7);
          const Buffer vectors = Buffer::random(compute_dtype(dtype), s.n * s.c);
          NormPassParams p{};
          p.kind = kind;
          p.dtype = dtype;
          p.x = x.map;
          p.norm = norm.norm;
          if (backward || (residual && number % 2)) p.other = other.map;
          if ((backward || residual) && number % 3) p.factor = vectors.data();
          if (backward && number % 3) p.added = vectors.data();
          check("norm_pass " + std::to_string(number),
                [&](int threads) { return norm_pass(p, x.channels_last, threads); });
        }
});

}  // namespace effk::sanitized
