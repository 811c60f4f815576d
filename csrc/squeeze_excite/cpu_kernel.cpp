#include "cpu_kernel.h"

#include "gate.h"

namespace effk {
namespace {

template <class C>
void plan(SeGateParams& p) {
  p.packed_size = GateLayout<C>(p.c, p.r).size;
  p.scratch_size = gate_scratch_size<C>(p.c, p.r);
}

template <class C>
void run(const SeGateParams& p, int64_t first, int64_t last, void* scratch) {
  gate_images<C>(static_cast<const C*>(p.packed), p.c, p.r, p.activation, p.gate,
                 static_cast<const C*>(p.pooled) + first * p.c, last - first, static_cast<C*>(p.out) + first * p.c,
                 static_cast<C*>(scratch));
}

}  // namespace

namespace EFFK_ISA {

void se_gate_plan(SeGateParams& p) { p.weight_dtype == Dtype::kFloat64 ? plan<double>(p) : plan<float>(p); }

void se_gate_pack(const SeGateParams& p) {
  with_storage(p.weight_dtype, [&](auto storage) {
    using T = decltype(storage);
    pack_gate<T>(p.weights, p.c, p.r, static_cast<compute_t<T>*>(p.packed));
  });
}

void se_gate_run(const SeGateParams& p, int64_t first_image, int64_t last_image, void* scratch) {
  (p.weight_dtype == Dtype::kFloat64 ? &run<double> : &run<float>)(p, first_image, last_image, scratch);
}

}  // namespace EFFK_ISA
}  // namespace effk
