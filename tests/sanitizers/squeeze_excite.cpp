#include "squeeze_excite/cpu_kernel.h"

#include "harness.h"

namespace effk::sanitized {

static std::vector<Buffer> se_gate(SeGateParams p, int64_t images, int threads) {
  const Dtype wide = compute_dtype(p.weight_dtype);
  EFFK_CPU_FUNCTION(se_gate_plan)(p);
  const Buffer packed(wide, p.packed_size), out(wide, images * p.c);
  p.packed = packed.data();
  p.out = out.data();
  EFFK_CPU_FUNCTION(se_gate_pack)(p);
  const auto run = EFFK_CPU_FUNCTION(se_gate_run);
  parallel_for(threads, images, wide, p.scratch_size,
               [&](int64_t begin, int64_t end, void* scratch) { run(p, begin, end, scratch); });
  return {out};
}

static const Cases cases([] {
  int number = 0;
  for (Dtype dtype : kDtypes)
    for (int64_t images : {1, 3, 9, 40})
      for (int64_t c : {1, 3, 17, 96, 300})
        for (int64_t r : {1, 5, 129}) {
          ++number;
          const Buffer pooled = Buffer::random(compute_dtype(dtype), images * c);
          const Buffer w1 = Buffer::random(dtype, r * c), w2 = Buffer::random(dtype, c * r);
          const Buffer b1 = Buffer::random(dtype, r), b2 = Buffer::random(dtype, c);
          SeGateParams p{};
          p.weight_dtype = dtype;
          p.weights = {w1.data(), number % 2 ? b1.data() : nullptr, w2.data(), number % 3 ? b2.data() : nullptr};
          p.pooled = pooled.data();
          p.c = c;
          p.r = r;
          p.activation = number % 7;
          p.gate = number % 2 ? kSigmoid : kHardsigmoid;
          check("se_gate " + std::to_string(number), [&](int threads) { return se_gate(p, images, threads); });
        }
});

}  // namespace effk::sanitized
