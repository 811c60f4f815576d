// Instruction sets of the CPU kernels, and the choice between them at run time.
//
// Every csrc/<op>/cpu_kernel.cpp is compiled once per instruction set, with EFFK_ISA as the name of its namespace. Sets
// that only add products of bfloat16 are for kernels with products, which EFFK_EACH_PRODUCT_ISA declares, in that dtype.
// Callers take the address of the variant that this machine runs: EFFK_CPU_FUNCTION(norm_pass_run)(params, ...), where
// there are products EFFK_PRODUCT_FUNCTION(dwconv_run, params.dtype)(params, ...).
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "types.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#define EFFK_EACH_ISA(X) X(baseline) X(avx2) X(avx512)
#define EFFK_EACH_PRODUCT_ISA(X) EFFK_EACH_ISA(X) X(avx512_bf16) X(amx)
#define EFFK_CPU_FUNCTION(name) \
  ::effk::select_isa(::effk::CpuIsa::kAvx512, &::effk::baseline::name, &::effk::avx2::name, &::effk::avx512::name)
#define EFFK_PRODUCT_FUNCTION(name, dtype)                                                          \
  ::effk::select_isa(::effk::best_product_isa(dtype), &::effk::baseline::name, &::effk::avx2::name, \
                     &::effk::avx512::name, &::effk::avx512_bf16::name, &::effk::amx::name)
#else
#define EFFK_EACH_ISA(X) X(baseline)
#define EFFK_EACH_PRODUCT_ISA(X) EFFK_EACH_ISA(X)
#define EFFK_CPU_FUNCTION(name) (&::effk::baseline::name)
#define EFFK_PRODUCT_FUNCTION(name, dtype) EFFK_CPU_FUNCTION(name)
#endif

namespace effk {

enum class CpuIsa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr CpuIsa kCpuIsas[] = {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16, CpuIsa::kAmx};

// Whether the processor, with AVX-512, has dot products of bfloat16.
inline bool has_avx512_bf16() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 5;
#else
  return false;
#endif
}

// Whether it has tiles of bfloat16 too, and the system keeps their registers for this process.
inline bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline CpuIsa best_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return !has_avx512_bf16() ? CpuIsa::kAvx512 : has_amx() ? CpuIsa::kAmx : CpuIsa::kAvx512Bf16;
  // GCC names no "f16c" before 13; every CPU with AVX2 and FMA has it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kBaseline;
}

inline const char* cpu_isa_name(CpuIsa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

// The instruction set in use: the best that this machine has, or a lesser one named by EFFKERNELS_CPU_ISA.
inline CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    const CpuIsa best = best_cpu_isa();
    const char* wanted = std::getenv("EFFKERNELS_CPU_ISA");
    if (!wanted || !*wanted) return best;
    for (CpuIsa isa : kCpuIsas)
      if (isa <= best && std::strcmp(wanted, cpu_isa_name(isa)) == 0) return isa;
    throw std::invalid_argument(std::string("EFFKERNELS_CPU_ISA must be an instruction set of this machine, one of "
                                            "baseline, avx2, avx512, avx512_bf16, amx, got ") + wanted);
  }();
  return chosen;
}

// The best instruction set for products of `dtype`.
inline CpuIsa best_product_isa(Dtype dtype) { return dtype == Dtype::kBFloat16 ? CpuIsa::kAmx : CpuIsa::kAvx512; }

// The variant of the set in use, or of `best` where that is beyond it.
template <class... Functions>
auto select_isa(CpuIsa best, Functions... functions) {
  const std::common_type_t<Functions...> variants[] = {functions...};
  return variants[static_cast<int>(cpu_isa() < best ? cpu_isa() : best)];
}

}  // namespace effk
