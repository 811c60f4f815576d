// The gate of squeeze-excite for a few images at a time: gate(w2 act(w1 pooled + b1) + b2). Only inside
// csrc/*/cpu_kernel.cpp.
#pragma once

#include <cstring>

#include "cpu_kernel.h"
#include "matmul.h"

namespace effk {
namespace {

// Of so few rows that making other operands of them would take longer than the products.
template <class T>
using GateProduct = PlainProduct<T>;

// Images whose gates are computed together, so that each weight is loaded once for all of them.
constexpr int64_t kGateImages = kTileRows;

// Where the packed weights of the gate lie, in elements.
template <class C>
struct GateLayout {
  int64_t w1 = 0, b1, w2, b2, size;

  GateLayout(int64_t c, int64_t r) {
    b1 = w1 + packed_size<GateProduct<C>>(r, c);
    w2 = b1 + round_up<C>(r);
    b2 = w2 + packed_size<GateProduct<C>>(c, r);
    size = b2 + round_up<C>(c);
  }
};

template <class C>
int64_t gate_scratch_size(int64_t c, int64_t r) {
  return kGateImages * (round_up<C>(r) + round_up<C>(c));
}

template <class T>
void pack_bias(const T* bias, int64_t n, compute_t<T>* packed) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < n; i += kLanes<C>)
    store(packed + i, bias ? load_n(bias + i, static_cast<int>(min64(n - i, kLanes<C>))) : Vec<C>{});
}

template <class T>
void pack_gate(const GateWeights& g, int64_t c, int64_t r, compute_t<T>* packed) {
  const GateLayout<compute_t<T>> at(c, r);
  pack_weight<GateProduct<T>>(static_cast<const T*>(g.w1), r, c, packed + at.w1);
  pack_bias(static_cast<const T*>(g.b1), r, packed + at.b1);
  pack_weight<GateProduct<T>>(static_cast<const T*>(g.w2), c, r, packed + at.w2);
  pack_bias(static_cast<const T*>(g.b2), c, packed + at.b2);
}

// out[i] = act(w in[i] + bias) for up to kGateImages rows; those of `out` are round_up(columns) long.
template <class C>
void gate_layer(const Rows<C>& in, int64_t count, const C* w, const C* bias, int64_t columns, int activation, C* out) {
  const Panels<C> panels(columns);
  const int64_t width = round_up<C>(columns);
  const GateProduct<C> product(count);
  for (int64_t i = 0; i < panels.count; ++i)
    product.store(in, count, w + panels.begin(i) * product.column_vector(in.depth), panels.vectors(i),
                  out + panels.begin(i) * kLanes<C>, width, kLanes<C>);
  with_activation(activation, [&](auto act) EFFK_INLINE {
    for (int64_t row = 0; row < count; ++row)
      for (int64_t j = 0; j < width; j += kLanes<C>) {
        C* at = out + row * width + j;
        store(at, activate<act>(load(at) + load(bias + j)));
      }
  });
}

// The gates of `images` images, with rows of c values in `pooled` and in `out`.
template <class C>
void gate_images(const C* packed, int64_t c, int64_t r, int activation, int gate, const C* pooled, int64_t images, C* out,
                 C* scratch) {
  const GateLayout<C> at(c, r);
  C *hidden = scratch, *gates = hidden + kGateImages * round_up<C>(r);
  for (int64_t image = 0; image < images; image += kGateImages) {
    const int64_t count = min64(images - image, kGateImages);
    gate_layer<C>({pooled + image * c, c, 1, c}, count, packed + at.w1, packed + at.b1, r, activation, hidden);
    gate_layer<C>({hidden, round_up<C>(r), 1, r}, count, packed + at.w2, packed + at.b2, c, gate, gates);
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + (image + i) * c, gates + i * round_up<C>(c), c * sizeof(C));
  }
}

}  // namespace
}  // namespace effk
