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

static std::vector<Buffer> se_gate_backward(SeGateBackwardParams p, bool sums, int threads) {
  const Dtype wide = compute_dtype(p.weight_dtype);
  const Buffer shift(wide, p.n * p.c), totals(wide, sums ? 2 * p.c : 0);
  const Buffer grad_w1(p.weight_dtype, p.r * p.c), grad_b1(p.weight_dtype, p.r);
  const Buffer grad_w2(p.weight_dtype, p.c * p.r), grad_b2(p.weight_dtype, p.c);
  p.shift = shift.data();
  p.sums = sums ? totals.data() : nullptr;
  p.grad_w1 = grad_w1.data();
  p.grad_b1 = grad_b1.data();
  p.grad_w2 = grad_w2.data();
  p.grad_b2 = grad_b2.data();
  EFFK_CPU_FUNCTION(se_gate_backward_plan)(p);
  const Buffer scratch = Buffer::of_bytes(wide, p.scratch_size);
  p.scratch = scratch.data();
  const auto images = EFFK_CPU_FUNCTION(se_gate_backward_images);
  parallel_for(threads, p.n, wide, 0, [&](int64_t begin, int64_t end, void*) { images(p, begin, end); });
  const auto channels = EFFK_CPU_FUNCTION(se_gate_backward_channels);
  parallel_for(threads, p.c, wide, 0, [&](int64_t begin, int64_t end, void*) { channels(p, begin, end); });
  return {shift, totals, grad_w1, grad_b1, grad_w2, grad_b2};
}

static const Cases cases([] {
  int number = 0;
  for (Dtype dtype : dtypes(/*products=*/false))
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

          const bool sums = number % 3;
          const int64_t rows = (sums ? 3 : 1) * images;
          const Dtype wide = compute_dtype(dtype);
          const Buffer grad = Buffer::random(wide, rows * c), means = Buffer::random(wide, rows * c);
          const Buffer gates = Buffer::random(wide, images * c);
          SeGateBackwardParams b{};
          b.weight_dtype = dtype;
          b.weights = p.weights;
          b.grad = grad.data();
          b.gates = gates.data();
          b.pooled = means.data();
          b.n = images;
          b.c = c;
          b.r = r;
          b.activation = number % 7;
          b.gate = p.gate;
          b.area = 49;
          check("se_gate_backward " + std::to_string(number),
                [&](int threads) { return se_gate_backward(b, sums, threads); });
        }
});

}  // namespace effk::sanitized
