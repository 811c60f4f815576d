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

// --- backward ---------------------------------------------------------------------------------------------------------

// What the images leave for the channels: du2, the gradient before the gate's activation, and of the hidden units their
// values and du1, the gradient before theirs.
template <class C>
struct BackwardScratch {
  int64_t hidden_stride;
  C *du2, *hidden, *du1;  // [N][C], [N][hidden_stride] twice

  explicit BackwardScratch(const SeGateBackwardParams& p)
      : hidden_stride(round_up<C>(p.r)), du2(static_cast<C*>(p.scratch)), hidden(du2 + p.n * p.c),
        du1(hidden + p.n * hidden_stride) {}
  int64_t bytes(const SeGateBackwardParams& p) const { return (p.c + 2 * hidden_stride) * p.n * sizeof(C); }
};

// f(i, sum over k < depth of a[i * a_row + k * a_step] * the vector at b + k * b_step) for each i < rows.
template <class C, class B, class F>
void products(const C* a, int64_t a_row, int64_t a_step, int64_t rows, int64_t depth, const B* b, int64_t b_step,
              int lanes, F f) {
  constexpr int kRows = 4;
  for (int64_t first = 0; first < rows; first += kRows) {
    const C* from[kRows];  // past the last row that one again
    for (int i = 0; i < kRows; ++i) from[i] = a + min64(first + i, rows - 1) * a_row;
    Vec<C> sums[kRows] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const Vec<C> values = load_n(b + k * b_step, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sums[i] += broadcast(from[i][k * a_step]) * values;
    }
    for (int i = 0; i < min64(rows - first, kRows); ++i) f(first + i, sums[i]);
  }
}

template <class C>
Vec<C> gate_slope(int gate, Vec<C> g) {
  constexpr C zero = 0, one = 1, six = 6;
  if (gate == kSigmoid) return g * (one - g);
  return (g > zero) & (g < one) ? broadcast(one / six) : Vec<C>{};
}

template <class T>
void backward_images(const SeGateBackwardParams& p, int64_t first, int64_t last) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const BackwardScratch<C> scratch(p);
  const int64_t images = last - first, stride = scratch.hidden_stride;
  const T *w1 = static_cast<const T*>(p.weights.w1), *b1 = static_cast<const T*>(p.weights.b1);
  const T* w2 = static_cast<const T*>(p.weights.w2);
  const C* pooled = static_cast<const C*>(p.pooled) + first * p.c;
  C *du2 = scratch.du2 + first * p.c, *u1 = scratch.hidden + first * stride, *du1 = scratch.du1 + first * stride;

  for (int64_t i = 0; i < images * p.c; i += V) {
    const int lanes = static_cast<int>(min64(images * p.c - i, V));
    const Vec<C> grad = load_n(static_cast<const C*>(p.grad) + first * p.c + i, lanes);
    const Vec<C> g = load_n(static_cast<const C*>(p.gates) + first * p.c + i, lanes);
    store_n(du2 + i, grad * gate_slope<C>(p.gate, g), lanes);
  }
  // Lanes are channels of a row of w1, summed at the end.
  for (int64_t n = 0; n < images; ++n)
    for (int64_t r = 0; r < stride; ++r) {
      Vec<C> total{};
      for (int64_t c = 0; r < p.r && c < p.c; c += V) {
        const int lanes = static_cast<int>(min64(p.c - c, V));
        total += load_n(pooled + n * p.c + c, lanes) * load_n(w1 + r * p.c + c, lanes);
      }
      u1[n * stride + r] = sum<C>(total);
    }
  with_activation(p.activation, [&](auto act) EFFK_INLINE {
    for (int64_t r = 0; r < p.r; r += V) {
      const int lanes = static_cast<int>(min64(p.r - r, V));
      const Vec<C> bias = b1 ? load_n(b1 + r, lanes) : Vec<C>{};
      products(du2, p.c, 1, images, p.c, w2 + r, p.r, lanes, [&](int64_t n, Vec<C> grad) EFFK_INLINE {
        C* at = u1 + n * stride + r;
        Vec<C> hidden, slope;
        activate_with_slope<act>(load(at) + bias, hidden, slope);
        store(at, hidden);
        store(du1 + n * stride + r, grad * slope);
      });
    }
  });
}

template <class T>
void backward_channels(const SeGateBackwardParams& p, int64_t first, int64_t last) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const BackwardScratch<C> scratch(p);
  const int64_t stride = scratch.hidden_stride, image = p.n * p.c;
  const C *grad = static_cast<const C*>(p.grad), *pooled = static_cast<const C*>(p.pooled);
  const C* gates = static_cast<const C*>(p.gates);
  C *shift = static_cast<C*>(p.shift), *sums = static_cast<C*>(p.sums);
  const C area = static_cast<C>(p.area);
  for (int64_t c = first; c < last; c += V) {
    const int lanes = static_cast<int>(min64(last - c, V));
    Vec<C> of_b2{}, of_slope{}, of_xhat{};
    products(scratch.du1, stride, 1, p.n, p.r, static_cast<const T*>(p.weights.w1) + c, p.c, lanes,
             [&](int64_t n, Vec<C> of_mean) EFFK_INLINE {
               const int64_t at = n * p.c + c;
               const Vec<C> s = of_mean / area, g = load_n(gates + at, lanes);
               store_n(shift + at, s, lanes);
               of_b2 += load_n(scratch.du2 + at, lanes);
               if (!sums) return;
               of_slope += g * load_n(grad + image + at, lanes) + s * load_n(pooled + image + at, lanes);
               of_xhat += g * load_n(grad + 2 * image + at, lanes) + s * load_n(pooled + 2 * image + at, lanes);
             });
    store_n(static_cast<T*>(p.grad_b2) + c, of_b2, lanes);
    if (sums) {
      store_n(sums + c, of_slope, lanes);
      store_n(sums + p.c + c, of_xhat, lanes);
    }
    products(scratch.du1, 1, stride, p.r, p.n, pooled + c, p.c, lanes, [&](int64_t r, Vec<C> of_row) EFFK_INLINE {
      store_n(static_cast<T*>(p.grad_w1) + r * p.c + c, of_row, lanes);
    });
  }
  for (int64_t r = 0; r < p.r; r += V) {
    const int lanes = static_cast<int>(min64(p.r - r, V));
    products(scratch.du2 + first, 1, p.c, last - first, p.n, scratch.hidden + r, stride, V,
             [&](int64_t c, Vec<C> of_row) EFFK_INLINE {
               store_n(static_cast<T*>(p.grad_w2) + (first + c) * p.r + r, of_row, lanes);
             });
    if (first > 0) continue;
    Vec<C> of_b1{};
    for (int64_t n = 0; n < p.n; ++n) of_b1 += load(scratch.du1 + n * stride + r);
    store_n(static_cast<T*>(p.grad_b1) + r, of_b1, lanes);
  }
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

void se_gate_backward_plan(SeGateBackwardParams& p) {
  p.scratch_size = p.weight_dtype == Dtype::kFloat64 ? BackwardScratch<double>(p).bytes(p) : BackwardScratch<float>(p).bytes(p);
}

void se_gate_backward_images(const SeGateBackwardParams& p, int64_t first_image, int64_t last_image) {
  with_storage(p.weight_dtype, [&](auto storage) { backward_images<decltype(storage)>(p, first_image, last_image); });
}

void se_gate_backward_channels(const SeGateBackwardParams& p, int64_t first_channel, int64_t last_channel) {
  with_storage(p.weight_dtype,
               [&](auto storage) { backward_channels<decltype(storage)>(p, first_channel, last_channel); });
}

}  // namespace EFFK_ISA
}  // namespace effk
