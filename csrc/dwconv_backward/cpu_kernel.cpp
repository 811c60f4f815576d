#include "cpu_kernel.h"

#include "common/depthwise.h"
#include "common/expand_rows.h"
#include "common/matmul.h"
#include "common/tile.h"
#include "dwconv_backward/expand_backward.h"

namespace effk {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;  // of scratch: a part of the second-level cache
constexpr int64_t kMinUnits = 32;           // enough for many cores to share evenly

// Lanes are channels. Row j = row + pad_top and column j = column + pad_left count from the padding's edge: the window of
// output o covers j = stride * o .. stride * o + k - 1, so that row j takes part in the outputs j / stride - i with the
// kernel's row j % stride + stride * i, and in no more than kReach + 1 of them.
//
// A unit walks down its band. The gradient of the raw output, dy, is computed once per row and stands in a ring of
// reach + 1 rows with zero columns at both sides; a row outside the map is a row of zeros, so that no tap has a bounds
// check. A row of x is normalised and activated once; its products with the rows of dy are the weight's gradient, those
// of the weight with the rows of dy its own.
template <class C>
struct Layout {
  int64_t vectors, reach, columns, dy_columns;
  // In vectors, of one vector of channels.
  int64_t dy_row, ring, x_row;
  int64_t buffer;  // of all the chunk's channels, in elements

  explicit Layout(const DwconvBackwardParams& p)
      : vectors(ceil_div(p.chunk_channels, kLanes<C>)), reach((p.kernel_size - 1) / p.stride),
        columns((p.pad_left + p.x.w - 1) / p.stride + 1), dy_columns(max64(columns, p.y.w)), dy_row(reach + dy_columns),
        ring((reach + 1) * dy_row | 1), x_row(columns * p.stride | 1),
        buffer(max64(p.x.w, p.y.w) * vectors * kLanes<C>) {}

  int64_t bytes(int64_t taps) const {
    const int64_t of_vector = ring + 3 * x_row + taps + 2;
    return (vectors * of_vector + dy_row) * kLanes<C> * sizeof(C) + 3 * buffer * sizeof(C);
  }
};

// dh [columns * S], and the products of h [columns * S] with the rows of dy added to dw [K * K]: for the kernel's rows
// J, J + S, ... and columns `begin` to `end` of dy.
template <class C>
using ConvolveRow = void (*)(const C* const* dy, const C* weights, const C* h, C* dh, C* dw, int64_t begin, int64_t end);

template <class C, int K, int S, int J, bool kInput, bool kWeight>
void convolve(const C* const* dy, const C* weights, const C* h, C* dh, C* dw, int64_t begin, int64_t end) {
  constexpr int V = kLanes<C>, N = (K - J + S - 1) / S;
  Vec<C> acc[N][K] = {};
  for (int64_t u = begin; u < end; ++u) {
#pragma GCC unroll 2
    for (int r = 0; r < S; ++r) {
      const Vec<C> value = kWeight ? load(h + (S * u + r) * V) : Vec<C>{};
      Vec<C> sum[2] = {};
#pragma GCC unroll 7
      for (int i = 0; i < N; ++i)
#pragma GCC unroll 7
        for (int kx = r; kx < K; kx += S) {
          const Vec<C> d = in_register(load(dy[i] + (u - kx / S) * V));
          if (kWeight) acc[i][kx] += d * value;
          if (kInput) sum[i % 2] += d * load(weights + ((J + S * i) * K + kx) * V);
        }
      if (kInput) store(dh + (S * u + r) * V, sum[0] + sum[1]);
    }
  }
  if (!kWeight) return;
#pragma GCC unroll 7
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 7
    for (int kx = 0; kx < K; ++kx) {
      C* at = dw + ((J + S * i) * K + kx) * V;
      store(at, load(at) + acc[i][kx]);
    }
}

template <class C, int K, int S, int J>
ConvolveRow<C> convolve_for(bool input, bool weight) {
  return !weight ? &convolve<C, K, S, J, true, false>
         : input ? &convolve<C, K, S, J, true, true>
                 : &convolve<C, K, S, J, false, true>;
}

// Whether that of before(x) is wanted, for itself or for what follows from it.
inline bool needs_gradient(const DwconvBackwardParams& p) {
  return p.grad_norm.data || p.sums || p.grad_x.data || p.expand_products;
}

// The functions for even and odd rows; for stride 1 there is one.
template <class C>
void choose(const DwconvBackwardParams& p, ConvolveRow<C>* rows) {
  const bool input = needs_gradient(p), weight = p.need_weight;
  const auto with_size = [&](auto size) {
    constexpr int K = size;
    rows[0] = p.stride == 1 ? convolve_for<C, K, 1, 0>(input, weight) : convolve_for<C, K, 2, 0>(input, weight);
    rows[1] = convolve_for<C, K, 2, 1>(input, weight);
  };
  switch (p.kernel_size) {
    case 3: return with_size(Constant<3>{});
    case 5: return with_size(Constant<5>{});
    default: return with_size(Constant<7>{});
  }
}

// Vectors of channels of a unit.
struct Channels {
  int64_t n, c, count;
};

// A row of dy, [columns][lanes] for each vector.
template <class C>
using StageGradient = void (*)(const DwconvBackwardParams& p, const Channels& u, Tile<C> grad, Tile<C> y, C* out,
                               int64_t vector);

template <class C, int A>
void stage_gradient(const DwconvBackwardParams& p, const Channels& u, Tile<C> grad, Tile<C> y, C* out, int64_t vector) {
  constexpr int V = kLanes<C>;
  for_blocks<C>(p.y.w, u.count, [&](int64_t c, int lanes, int64_t begin, int64_t end) EFFK_INLINE {
    const int64_t channel = u.c + c, image = u.n * p.x.c + channel;
    const Vec<C> factor = lanes_of<C>(p.scale, image, lanes, 1), added = lanes_of<C>(p.shift, image, lanes, 0);
    const Vec<C> scale = lanes_of<C>(p.after.scale, channel, lanes, 1);
    const Vec<C> shift = lanes_of<C>(p.after.shift, channel, lanes, 0);
    const Vec<C> mean = lanes_of<C>(p.after.mean, channel, lanes, 0);
    const Vec<C> slope = lanes_of<C>(p.after.slope, channel, lanes, 0);
    const Vec<C> constant = lanes_of<C>(p.after.constant, channel, lanes, 0);
    C* row = out + c / V * vector;
    for (int64_t i = begin; i < end; ++i) {
      const Vec<C> value = y.at(i, c);
      Vec<C> h, of_act;
      activate_with_slope<A>(value * scale + shift, h, of_act);
      const Vec<C> dz = (grad.at(i, c) * factor + added) * of_act;
      store(row + i * V, dz * scale + (value - mean) * slope + constant);
    }
  });
}

// A row of h = act(before(x)) and of its slopes, [columns][lanes] for each vector.
template <class C>
using StageInput = void (*)(const DwconvBackwardParams& p, const Channels& u, Tile<C> x, C* h, C* slopes,
                            int64_t vector);

template <class C, int A>
void stage_input(const DwconvBackwardParams& p, const Channels& u, Tile<C> x, C* h, C* slopes, int64_t vector) {
  constexpr int V = kLanes<C>;
  for_blocks<C>(p.x.w, u.count, [&](int64_t c, int lanes, int64_t begin, int64_t end) EFFK_INLINE {
    const Vec<C> scale = lanes_of<C>(p.before.scale, u.c + c, lanes, 1);
    const Vec<C> shift = lanes_of<C>(p.before.shift, u.c + c, lanes, 0);
    const int64_t row = c / V * vector;
    for (int64_t i = begin; i < end; ++i) {
      Vec<C> activated, slope;
      activate_with_slope<A>(x.at(i, c) * scale + shift, activated, slope);
      store(h + row + i * V, activated);
      store(slopes + row + i * V, slope);
    }
  });
}

// dz = dh * slopes of one row, to the map by way of `buffer` or, times the scale of the BatchNorm, to `expanded`; and its
// sums [2] for each vector.
template <class T>
void finish_row(const DwconvBackwardParams& p, const Channels& u, int64_t row, Tile<compute_t<T>> x,
                const compute_t<T>* dh, const compute_t<T>* slopes, int64_t vector, compute_t<T>* sums,
                compute_t<T>* expanded, compute_t<T>* buffer, int64_t buffer_row) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const Map& out = p.grad_norm;
  const bool direct = out.stride_c == 1;
  T* memory = static_cast<T*>(const_cast<void*>(out.data)) + u.n * out.stride_n + row * out.stride_h + u.c * out.stride_c;
  for_blocks<C>(p.x.w, u.count, [&](int64_t c, int lanes, int64_t begin, int64_t end) EFFK_INLINE {
    const Vec<C> mean = lanes_of<C>(p.before.mean, u.c + c, lanes, 0);
    const Vec<C> scale = lanes_of<C>(p.before.scale, u.c + c, lanes, 1);
    const int64_t v = c / V;
    Vec<C> sum{}, of_x{};
    for (int64_t i = begin; i < end; ++i) {
      Vec<C> dz = load(dh + v * vector + i * V) * load(slopes + v * vector + i * V);
      if (expanded) {
        store(expanded + i * buffer_row + c, dz * scale);
      } else if (direct) {
        T* at = memory + i * out.stride_w + c;
        __builtin_prefetch(at + out.stride_h, 1);
        store_n(at, dz, lanes);
      } else {
        store(buffer + i * buffer_row + c, dz);
      }
      if (!expanded) dz = rounded<T>(dz);
      sum += dz;
      of_x += dz * (load(x.data + i * x.stride + c) - mean);
    }
    C* total = sums + 2 * v * V;
    store(total, load(total) + sum);
    store(total + V, load(total + V) + of_x);
  });
  if (!expanded && !direct) store_tile<T>(out, u.n, row * p.x.w, p.x.w, u.c, u.count, buffer, buffer_row);
}

template <class T>
void run(const DwconvBackwardParams& p, int64_t n, int64_t chunk, int64_t band, ExpandedRows<T>* expanded,
         ExpandBackward<T>* expansion, void* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const Layout<C> layout(p);
  const int64_t begin = band * p.band_rows, end = min64(begin + p.band_rows, p.x.h), partial = n * p.bands + band;
  const Channels u{n, chunk * p.chunk_channels, min64(p.chunk_channels, p.x.c - chunk * p.chunk_channels)};
  const int64_t vectors = ceil_div(u.count, V), taps = p.kernel_size * p.kernel_size, s = p.stride;
  const int64_t ring_size = layout.ring * V, x_size = layout.x_row * V, dy_row = layout.dy_row * V;
  C* ring = static_cast<C*>(scratch);           // [vectors][reach + 1][dy_row]
  C* zeros = ring + layout.vectors * ring_size;  // [dy_row]
  C* h = zeros + dy_row;                         // [vectors][x_row], as the next two
  C* slopes = h + layout.vectors * x_size;
  C* dh = slopes + layout.vectors * x_size;
  C* dw = dh + layout.vectors * x_size;            // [vectors][taps]
  C* sums = dw + layout.vectors * taps * V;        // [vectors][2]
  C* x_buffer = sums + layout.vectors * 2 * V;
  C *buffer = x_buffer + layout.buffer, *other = buffer + layout.buffer;
  for (C* at = ring; at < slopes; at += V) store(at, Vec<C>{});
  for (C* at = dw; at < x_buffer; at += V) store(at, Vec<C>{});

  ConvolveRow<C> convolve_row[2];
  choose<C>(p, convolve_row);
  StageGradient<C> gradient = nullptr;
  StageInput<C> input = nullptr;
  with_activation(p.after.activation, [&](auto act) { gradient = &stage_gradient<C, act>; });
  with_activation(p.before.activation, [&](auto act) { input = &stage_input<C, act>; });

  const int64_t left = p.pad_left * V, first = p.pad_left / s;
  const C* weights = static_cast<const C*>(p.packed) + u.c * taps;
  int64_t staged = max64((begin + p.pad_top) / s - layout.reach, 0);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t j = row + p.pad_top, newest = j / s;
    for (; staged <= min64(newest, p.y.h - 1); ++staged) {
      const Tile<C> grad = load_tile<T>(p.grad, n, staged * p.y.w, p.y.w, u.c, u.count, buffer);
      const Tile<C> y = load_tile<T>(p.y, n, staged * p.y.w, p.y.w, u.c, u.count, other);
      gradient(p, u, grad, y, ring + staged % (layout.reach + 1) * dy_row + layout.reach * V, ring_size);
    }
    const Tile<C> x = expanded ? Tile<C>{expanded->row(n, row, end), expanded->stride(), 0}
                               : load_tile<T>(p.x, n, row * p.x.w, p.x.w, u.c, u.count, x_buffer);
    input(p, u, x, h + left, slopes + left, x_size);
    for (int64_t v = 0; v < vectors; ++v) {
      const C* dy[7];
      for (int64_t i = 0; i <= layout.reach; ++i) {
        const int64_t out = newest - i;
        dy[i] = (out < 0 || out >= p.y.h ? zeros : ring + v * ring_size + out % (layout.reach + 1) * dy_row) +
                layout.reach * V;
      }
      convolve_row[j % s](dy, weights + v * taps * V, h + v * x_size, dh + v * x_size, dw + v * taps * V, first,
                          layout.columns);
    }
    if (needs_gradient(p))
      finish_row<T>(p, u, row, x, dh + left, slopes + left, x_size, sums, expansion ? expansion->row(row) : nullptr,
                    buffer, layout.vectors * V);
    if (expansion) expansion->end_row(row);
  }

  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = u.c + v * V;
    for (int64_t t = 0; p.need_weight && t < taps; ++t)
      store(static_cast<C*>(p.products) + (partial * taps + t) * p.padded + c, load(dw + (v * taps + t) * V));
    for (int64_t i = 0; p.sums && i < 2; ++i)
      store(static_cast<C*>(p.sums) + (partial * 2 + i) * p.padded + c, load(sums + (v * 2 + i) * V));
  }
}

template <class T>
void run(const DwconvBackwardParams& p, int64_t unit, void* scratch) {
  using C = compute_t<T>;
  const int64_t band = unit % p.bands, taps = p.kernel_size * p.kernel_size;
  if (!p.expand.x.data)
    return run<T>(p, unit / p.bands / p.chunks, unit / p.bands % p.chunks, band, nullptr, nullptr, scratch);
  const int64_t n = unit / p.bands, begin = band * p.band_rows, end = min64(begin + p.band_rows, p.x.h);
  const C* weight = static_cast<const C*>(p.packed) + p.padded * taps;
  const C* transposed = weight + packed_expansion_size<T>(p.expand, p.chunks, p.chunk_channels);
  C* rows = static_cast<C*>(scratch) + Layout<C>(p).bytes(taps) / sizeof(C);
  C* products = rows + ExpandedRows<T>::scratch_size(p.expand, p.chunk_channels);
  ExpandBackward<T> expansion(p, transposed, n, begin, end, unit, products);
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    const int64_t channels = min64(p.chunk_channels, p.x.c - chunk * p.chunk_channels);
    ExpandedRows<T> expanded(p.expand, weight, chunk, p.chunk_channels, channels, rows);
    expansion.begin_chunk(chunk, channels);
    run<T>(p, n, chunk, band, &expanded, &expansion, scratch);
  }
  expansion.finish();
}

template <class T>
void plan(DwconvBackwardParams& p) {
  using C = compute_t<T>;
  const int64_t taps = p.kernel_size * p.kernel_size, vectors = ceil_div(p.x.c, kLanes<C>);
  p.chunk_channels = kLanes<C>;
  const int64_t fitting = max64(min64(kChunkBytes / Layout<C>(p).bytes(taps), vectors), 1);
  const int64_t per_chunk = ceil_div(vectors, ceil_div(vectors, fitting));
  p.chunk_channels = per_chunk * kLanes<C>;
  p.chunks = ceil_div(p.x.c, p.chunk_channels);
  const bool expands = p.expand.x.data;
  const int64_t wanted = ceil_div(kMinUnits, max64(p.x.n * (expands ? 1 : p.chunks), 1));
  p.band_rows = max64(ceil_div(p.x.h, wanted), min64(p.x.h, 4 * p.kernel_size));
  if (expands) {  // whose gradient of a band stays in the cache
    const int64_t row = p.x.w * round_up<C>(p.expand.x.c) * static_cast<int64_t>(sizeof(C));
    p.band_rows = min64(p.band_rows, max64(kChunkBytes / row, p.kernel_size));
  }
  p.bands = ceil_div(p.x.h, p.band_rows);
  p.units = p.x.n * p.bands * (expands ? 1 : p.chunks);
  p.padded = round_up<C>(p.x.c);
  p.packed_size = p.padded * taps * sizeof(C);
  p.products_size = p.need_weight ? p.x.n * p.bands * taps * p.padded * sizeof(C) : 0;
  p.scratch_size = Layout<C>(p).bytes(taps);
  if (!expands) return;
  p.expand_padded = round_up<C>(p.expand.x.c);
  p.expand_products_size = p.x.n * p.bands * p.x.c * p.expand_padded * sizeof(C);
  p.packed_size += packed_expansion_size<T>(p.expand, p.chunks, p.chunk_channels) * sizeof(C);
  p.packed_size += ExpandBackward<T>::packed_size(p) * sizeof(C);
  p.scratch_size += ExpandedRows<T>::scratch_size(p.expand, p.chunk_channels) * sizeof(C);
  p.scratch_size += typename ExpandBackward<T>::Sizes(p).all * sizeof(C);
}

template <class T>
void pack(const DwconvBackwardParams& p) {
  const int64_t taps = p.kernel_size * p.kernel_size;
  compute_t<T>* packed = static_cast<compute_t<T>*>(p.packed);
  pack_taps(static_cast<const T*>(p.weight), p.x.c, taps, packed);
  if (!p.expand.x.data) return;
  packed += p.padded * taps;
  pack_expansion<T>(p.expand, p.x.c, p.chunk_channels, packed);
  ExpandBackward<T>::pack(p, packed + packed_expansion_size<T>(p.expand, p.chunks, p.chunk_channels));
}

}  // namespace

namespace EFFK_ISA {

void dwconv_backward_plan(DwconvBackwardParams& p) {
  with_product_storage(p.dtype, [&](auto storage) { plan<decltype(storage)>(p); });
}

void dwconv_backward_pack(const DwconvBackwardParams& p) {
  with_product_storage(p.dtype, [&](auto storage) { pack<decltype(storage)>(p); });
}

void dwconv_backward_run(const DwconvBackwardParams& p, int64_t first, int64_t last, void* scratch) {
  with_product_storage(p.dtype, [&](auto storage) {
    for (int64_t i = first; i < last; ++i) run<decltype(storage)>(p, i, scratch);
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
