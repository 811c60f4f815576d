// Instruction sets of the CPU kernels, and the choice between them at run time.
//
// Every csrc/<op>/cpu_kernel.cpp is compiled once per instruction set, with EFFK_ISA as the name of its namespace.
// Callers take the address of the variant that this machine runs: EFFK_CPU_FUNCTION(dwconv_run)(params, ...).
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#define EFFK_EACH_ISA(X) X(baseline) X(avx2) X(avx512)
#define EFFK_CPU_FUNCTION(name) \
  ::effk::select_isa(&::effk::baseline::name, &::effk::avx2::name, &::effk::avx512::name)
#else
#define EFFK_EACH_ISA(X) X(baseline)
#define EFFK_CPU_FUNCTION(name) (&::effk::baseline::name)
#endif

namespace effk {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

inline CpuIsa best_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return CpuIsa::kAvx512;
  // GCC names no "f16c" before 13; every CPU with AVX2 and FMA has it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kBaseline;
}

inline const char* cpu_isa_name(CpuIsa isa) {
  return isa == CpuIsa::kAvx512 ? "avx512" : isa == CpuIsa::kAvx2 ? "avx2" : "baseline";
}

// The instruction set in use: the best that this machine has, or a lesser one named by EFFKERNELS_CPU_ISA.
inline CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    const CpuIsa best = best_cpu_isa();
    const char* wanted = std::getenv("EFFKERNELS_CPU_ISA");
    if (!wanted || !*wanted) return best;
    for (CpuIsa isa : {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512})
      if (isa <= best && std::strcmp(wanted, cpu_isa_name(isa)) == 0) return isa;
    throw std::invalid_argument(std::string("EFFKERNELS_CPU_ISA must be an instruction set of this machine, one of "
                                            "baseline, avx2, avx512, got ") + wanted);
  }();
  return chosen;
}

template <class Function>
Function select_isa(Function baseline, Function avx2, Function avx512) {
  const CpuIsa isa = cpu_isa();
  return isa == CpuIsa::kAvx512 ? avx512 : isa == CpuIsa::kAvx2 ? avx2 : baseline;
}

}  // namespace effk
