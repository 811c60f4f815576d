#include "cpu_kernel.h"

#include "vec_map.h"

namespace effk {
namespace {

template <class T, class C>
inline EFFK_INLINE C dot(const T* a, const C* b, int64_t n) {
  constexpr int V = kLanes<C>;
  Vec<C> acc[2] = {};
  int64_t i = 0;
  for (; i + 2 * V <= n; i += 2 * V) {
    acc[0] += load(a + i) * load(b + i);
    acc[1] += load(a + i + V) * load(b + i + V);
  }
  for (; i < n; i += V) {
    const int lanes = static_cast<int>(min64(n - i, V));
    acc[0] += load_n(a + i, lanes) * load_n(b + i, lanes);
  }
  return sum<C>(acc[0] + acc[1]);
}

// out = act(w in + bias), w [rows, columns]
template <class T, class C>
inline void layer(const T* w, const T* bias, const C* in, int64_t rows, int64_t columns, int activation, C* out) {
  for (int64_t i = 0; i < rows; ++i) out[i] = dot(w + i * columns, in, columns) + (bias ? load_n(bias + i, 1)[0] : C(0));
  with_activation(activation, [&](auto act) EFFK_INLINE {
    for (int64_t i = 0; i < rows; i += kLanes<C>) {
      const int lanes = static_cast<int>(min64(rows - i, kLanes<C>));
      store_n(out + i, activate<act>(load_n(out + i, lanes)), lanes);
    }
  });
}

template <class T>
void gate_image(const SeGateParams& p, int64_t n, void* scratch) {
  using C = compute_t<T>;
  C* hidden = static_cast<C*>(scratch);
  layer(static_cast<const T*>(p.w1), static_cast<const T*>(p.b1), static_cast<const C*>(p.pooled) + n * p.c, p.r, p.c,
        p.activation, hidden);
  layer(static_cast<const T*>(p.w2), static_cast<const T*>(p.b2), hidden, p.c, p.r, p.gate,
        static_cast<C*>(p.out) + n * p.c);
}

}  // namespace

namespace EFFK_ISA {

void se_gate_run(const SeGateParams& p, int64_t first_image, int64_t last_image, void* scratch) {
  with_storage(p.weight_dtype, [&](auto storage) {
    for (int64_t n = first_image; n < last_image; ++n) gate_image<decltype(storage)>(p, n, scratch);
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
