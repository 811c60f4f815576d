// SIMD vectors for the CPU kernels, on the compiler's vector extensions: one source for every instruction set.
//
// Only inside csrc/*/cpu_kernel.cpp. Everything lies in an anonymous namespace, so that no function compiled for one
// instruction set can be linked into another's code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activation.h"
#include "types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// For what is called once per vector: a call there costs more than the arithmetic.
#define EFFK_INLINE __attribute__((always_inline))

namespace effk {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVecBytes)));
  typedef int32_t mask __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVecBytes)));
  typedef int64_t mask __attribute__((vector_size(kVecBytes)));
};
template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
constexpr int kLanes = kVecBytes / sizeof(C);

using VecF = Vec<float>;
using VecD = Vec<double>;
typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes / 2)));

template <class To, class From>
inline EFFK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class C>
inline EFFK_INLINE Vec<C> broadcast(C value) {
  return value - Vec<C>{};
}

// --- loads and stores: compute_t<T> in registers, T in memory, any alignment -----------------------------------------

inline EFFK_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline EFFK_INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline EFFK_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline EFFK_INLINE void store(double* p, VecD v) { __builtin_memcpy(p, &v, sizeof(v)); }

inline EFFK_INLINE VecF load(const BFloat16* p) {
#if defined(__AVX512F__)
  // Where GCC 12 would convert in halves.
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return bit_cast<VecF>(bit_cast<VecU>(_mm512_maskz_cvtepu16_epi32(0xffff, bits)) << 16);
#else
  VecU16 bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bit_cast<VecF>(__builtin_convertvector(bits, VecU) << 16);
#endif
}

#if defined(__AVX512BF16__)
inline EFFK_INLINE void store(BFloat16* p, VecF v) {
  const __m256bh out = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &out, sizeof(out));
}
#else
inline EFFK_INLINE void store(BFloat16* p, VecF v) {
  const VecU bits = bit_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const VecU16 out = __builtin_convertvector(v == v ? rounded : VecU{} + 0x7fc0, VecU16);
  __builtin_memcpy(p, &out, sizeof(out));
}
#endif

#if defined(__AVX512F__)
inline EFFK_INLINE VecF load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline EFFK_INLINE void store(Half* p, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline EFFK_INLINE VecF load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline EFFK_INLINE void store(Half* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline EFFK_INLINE VecF load(const Half* p) {
  VecU16 narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  const VecU h = __builtin_convertvector(narrow, VecU);
  // Exponent and mantissa at float's place, times 2^112: exact, for denormals too. Infinity and NaN keep exponent 255.
  const VecU magnitude = (h & 0x7fff) << 13;
  const VecF scaled = bit_cast<VecF>(magnitude) * 0x1p112f;
  const VecU value = (h & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : bit_cast<VecU>(scaled);
  return bit_cast<VecF>(value | ((h & 0x8000) << 16));
}
inline EFFK_INLINE void store(Half* p, VecF v) {
  const VecU bits = bit_cast<VecU>(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const VecU normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5 rounds the value to a multiple of 2^-24, half's smallest step.
  const VecU denormal = bit_cast<VecU>(bit_cast<VecF>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  VecU half = magnitude < (113u << 23) ? denormal : normal;
  half = magnitude >= 0x477ff000u ? VecU{} + 0x7c00 : half;  // from 65520 on: infinity
  half = magnitude > 0x7f800000u ? VecU{} + 0x7e00 : half;
  const VecU16 out = __builtin_convertvector(half | sign, VecU16);
  __builtin_memcpy(p, &out, sizeof(out));
}
#endif

// Keeps v in a register: the compiler may not load it again from memory for each use.
template <class V>
inline EFFK_INLINE V in_register(V v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// The first n lanes; the others are zero (load) or left alone (store). 0 < n <= kLanes.
template <class T>
inline EFFK_INLINE Vec<compute_t<T>> load_n(const T* p, int n) {
  constexpr int lanes = kLanes<compute_t<T>>;
  if (n >= lanes) return load(p);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) return bit_cast<VecF>(_mm512_maskz_loadu_ps(mask, p));
  if constexpr (sizeof(T) == 8) return bit_cast<Vec<compute_t<T>>>(_mm512_maskz_loadu_pd(mask, p));
  if constexpr (sizeof(T) == 2) {
    T buffer[lanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(mask, p));
    return load(buffer);
  }
#endif
  T buffer[lanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
inline EFFK_INLINE void store_n(T* p, Vec<compute_t<T>> v, int n) {
  constexpr int lanes = kLanes<compute_t<T>>;
  if (n >= lanes) return store(p, v);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, mask, v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, mask, v);
  if constexpr (sizeof(T) == 2) {
    T buffer[lanes];
    store(buffer, v);
    return _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
  }
#endif
  T buffer[lanes];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

// The first n elements, `stride` apart; the others are zero.
template <class T>
inline EFFK_INLINE Vec<compute_t<T>> load_strided(const T* p, int64_t stride, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 mask = n >= 16 ? 0xffff : (1u << n) - 1;
    if (stride < (1 << 26))
      return _mm512_mask_i32gather_ps(VecF{}, mask, _mm512_mullo_epi32(lane, _mm512_set1_epi32(stride)), p, 4);
  }
#endif
  T buffer[kLanes<compute_t<T>>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

// What `v` is after a round trip through storage T.
template <class T>
inline EFFK_INLINE Vec<compute_t<T>> rounded(Vec<compute_t<T>> v) {
  if constexpr (sizeof(T) == sizeof(compute_t<T>)) {
    return v;
  } else {
    T buffer[kLanes<compute_t<T>>];
    store(buffer, v);
    return load(buffer);
  }
}

template <class C>
inline EFFK_INLINE Vec<C> lane_index() {
  Vec<C> v;
  for (int i = 0; i < kLanes<C>; ++i) v[i] = static_cast<C>(i);
  return v;
}

// The first n lanes of v, zero elsewhere.
template <class C>
inline EFFK_INLINE Vec<C> keep_n(Vec<C> v, int n) {
  return n >= kLanes<C> ? v : (lane_index<C>() < static_cast<C>(n) ? v : Vec<C>{});
}

template <class C>
using Lanes = typename VecOf<C>::mask;

// Lane i is lane from[i] of a, or from[i] - kLanes of b.
template <class C>
inline EFFK_INLINE Vec<C> shuffle(Vec<C> a, Vec<C> b, Lanes<C> from) {
#if defined(__clang__)
  Vec<C> out;
  for (int i = 0; i < kLanes<C>; ++i) out[i] = from[i] < kLanes<C> ? a[from[i]] : b[from[i] - kLanes<C>];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

template <class C>
inline EFFK_INLINE C sum(Vec<C> v) {
#pragma GCC unroll 4
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    Lanes<C> upper;
    for (int i = 0; i < kLanes<C>; ++i) upper[i] = (i + half) % kLanes<C>;
    v += shuffle<C>(v, v, upper);
  }
  return v[0];
}

// --- mathematics ------------------------------------------------------------------------------------------------------

template <int N>
using Constant = std::integral_constant<int, N>;

// The smaller (larger) of v and bound; v where v is NaN.
inline EFFK_INLINE VecF at_most(VecF v, float bound) {
#if defined(__AVX512F__)
  return _mm512_min_ps(broadcast(bound), v);
#elif defined(__AVX2__)
  return _mm256_min_ps(broadcast(bound), v);
#else
  return v > bound ? broadcast(bound) : v;
#endif
}
inline EFFK_INLINE VecF at_least(VecF v, float bound) {
#if defined(__AVX512F__)
  return _mm512_max_ps(broadcast(bound), v);
#elif defined(__AVX2__)
  return _mm256_max_ps(broadcast(bound), v);
#else
  return v < bound ? broadcast(bound) : v;
#endif
}
inline EFFK_INLINE VecD at_most(VecD v, double bound) { return v > bound ? broadcast(bound) : v; }
inline EFFK_INLINE VecD at_least(VecD v, double bound) { return v < bound ? broadcast(bound) : v; }

// 1 / v to about one ulp, for 1 <= v < 2^126.
inline EFFK_INLINE VecF reciprocal(VecF v) {
#if defined(__AVX512F__)
  const VecF r = _mm512_maskz_rcp14_ps(0xffff, v);
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}
inline EFFK_INLINE VecD reciprocal(VecD v) { return 1.0 / v; }

// 2^f for |f| <= 1/2: a minimax polynomial, relative error 7.5e-8.
inline EFFK_INLINE VecF exp2_fraction(VecF f) {
  VecF p = f * 1.327647198e-3f + 9.675541334e-3f;
  p = p * f + 5.550713274e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  return p * f + 1.000000072f;
}

// exp(-v) for v clamped to [-87, 87], so that neither it nor its reciprocal overflows or underflows.
inline EFFK_INLINE VecF exp_neg(VecF v) {
  // 2^t = 2^n 2^f with n = round(t).
  constexpr float kScale = -1.44269504089f, kRound = 12582912.0f;  // 1.5 * 2^23: n stands in the low mantissa bits
  v = at_most(at_least(v, -87.0f), 87.0f);
  const VecF shifted = v * kScale + kRound, n = shifted - kRound, f = v * kScale - n;
  const VecF p = exp2_fraction(f);
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, p, n);
#else
  return bit_cast<VecF>(bit_cast<VecU>(p) + (bit_cast<VecU>(shifted) << 23));
#endif
}
inline EFFK_INLINE VecD exp_neg(VecD v) {
  VecD out;
  for (int i = 0; i < kLanes<double>; ++i) out[i] = __builtin_exp(-v[i]);
  return out;
}

// 1 / (1 + exp(-z)).
template <class V>
inline EFFK_INLINE V logistic(V z) {
  return reciprocal(static_cast<std::remove_reference_t<decltype(z[0])>>(1) + exp_neg(z));
}
#if defined(__AVX512F__)
// As above in fewer steps: the processor takes the fraction of the exponent, saturates 2^n and gives 1 / infinity = 0, so
// that only the Newton step needs a bound.
inline EFFK_INLINE VecF logistic(VecF z) {
  const VecF t = z * -1.44269504089f;
  const VecF f = _mm512_maskz_reduce_ps(0xffff, t, 8);  // t - round(t), of infinity zero
  const VecF e = 1.0f + VecF(_mm512_maskz_scalef_ps(0xffff, exp2_fraction(f), t - f));
  const VecF r = _mm512_maskz_rcp14_ps(0xffff, e);
  return r * (2.0f - at_most(e, 0x1.fffffep127f) * r);
}
#endif

template <int A, class V>
inline EFFK_INLINE V activate(V z) {
  using C = std::remove_reference_t<decltype(z[0])>;
  constexpr C one = 1, three = 3, six = 6;
#if defined(__AVX512F__)
  if constexpr (A == kSilu && std::is_same_v<C, float>) return z * logistic(z);
#endif
  // The last term makes NaN of -infinity, which the exponential's clamp hides, as the quotient z / infinity would.
  if constexpr (A == kSilu) return z * logistic(z) + at_most(z, 0) * 0;
  if constexpr (A == kSigmoid) return logistic(z);
  if constexpr (A == kRelu) return at_least(z, 0);
  if constexpr (A == kRelu6) return at_most(at_least(z, 0), six);
  if constexpr (A == kHardswish) return z * at_most(at_least(z + three, 0), six) * (one / six);
  if constexpr (A == kHardsigmoid) return at_most(at_least(z + three, 0), six) * (one / six);
  if constexpr (A == kIdentity) return z;
}

// The same, where the result counts as T only: SiLU for bfloat16, whose rounding error is 2^-9, to 2^-12 in two thirds of
// the steps.
template <class T, int A, class V>
inline EFFK_INLINE V activate_for(V z) {
#if defined(__AVX512F__)
  if constexpr (A == kSilu && std::is_same_v<T, BFloat16>) {
    const VecF t = z * -1.44269504089f;
    const VecF f = _mm512_maskz_reduce_ps(0xffff, t, 8);
    const VecF p = ((f * 5.517167e-2f + 2.4261112e-1f) * f + 6.9326099e-1f) * f + 9.9992807e-1f;
    return z * VecF(_mm512_maskz_rcp14_ps(0xffff, 1.0f + VecF(_mm512_maskz_scalef_ps(0xffff, p, t - f))));
  }
#endif
  return activate<A>(z);
}

// h = act(z) and slope = act'(z), as PyTorch has it where act has a kink.
template <int A, class V>
inline EFFK_INLINE void activate_with_slope(V z, V& h, V& slope) {
  using C = std::remove_reference_t<decltype(z[0])>;
  constexpr C zero = 0, one = 1, three = 3, six = 6, half = 0.5;
  const V ones = broadcast(one);
  h = activate<A>(z);
  if constexpr (A == kSilu || A == kSigmoid) {
    const V s = logistic(z);
    if constexpr (A == kSilu) h = z * s;
    slope = A == kSilu ? s + h * (one - s) : s * (one - s);
  } else if constexpr (A == kRelu) {
    slope = z <= zero ? V{} : ones;
  } else if constexpr (A == kRelu6) {
    slope = (z <= zero) | (z >= six) ? V{} : ones;
  } else if constexpr (A == kHardswish) {
    slope = z <= -three ? V{} : z >= three ? ones : z * (one / three) + half;
  } else if constexpr (A == kHardsigmoid) {
    slope = (z <= -three) | (z >= three) ? V{} : ones * (one / six);
  } else {
    slope = ones;
  }
}

// f(Constant<activation>) for the activation given at run time.
template <class F>
inline void with_activation(int activation, F f) {
  switch (activation) {
    case kSilu: return f(Constant<kSilu>{});
    case kRelu: return f(Constant<kRelu>{});
    case kRelu6: return f(Constant<kRelu6>{});
    case kHardswish: return f(Constant<kHardswish>{});
    case kSigmoid: return f(Constant<kSigmoid>{});
    case kHardsigmoid: return f(Constant<kHardsigmoid>{});
    default: return f(Constant<kIdentity>{});
  }
}

}  // namespace
}  // namespace effk
