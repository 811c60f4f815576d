#include "cpu_kernel.h"

#include "common/matmul.h"
#include "common/tile.h"

namespace effk {
namespace {

// A tile's channels, as floats, fill at most a part of the second-level cache, and its pixels many tiles of `multiply`.
constexpr int64_t kTileBytes = 256 << 10;
constexpr int64_t kMaxPixels = 112;
constexpr int64_t kMinUnits = 32;  // enough for many cores to share evenly

template <class C>
int64_t tile_pixels(int64_t channels, int64_t map) {
  const int64_t fitting = max64(min64(kTileBytes / static_cast<int64_t>(sizeof(C)) / round_up<C>(channels), kMaxPixels), 16);
  return ceil_div(map, ceil_div(map, fitting));
}

// --- forward ----------------------------------------------------------------------------------------------------------

// out = act(scale * in + shift) * gate of whole vectors of channels.
template <class C>
using Activate = void (*)(Tile<C> in, int64_t pixels, int64_t channels, const Affine& affine, const C* gate, C* out,
                          int64_t stride);

template <class C, int A>
void activate_tile(Tile<C> in, int64_t pixels, int64_t channels, const Affine& affine, const C* gate, C* out,
                   int64_t stride) {
  for_blocks<C>(pixels, channels, [&](int64_t c, int lanes, int64_t begin, int64_t end) EFFK_INLINE {
    const Scale<C> scale = Scale<C>::lanes(affine, c, lanes);
    const Vec<C> g = lanes_of<C>(gate, c, lanes, 1);
    for (int64_t i = begin; i < end; ++i)
      store(out + i * stride + c, activate<A>(scale(in.at(i, c))) * g);
  });
}

template <class T>
struct PointwiseScratch {
  using C = compute_t<T>;
  int64_t x_stride, panel = kPanelVectors * kLanes<C>, x_size, left_size, out_size, vectors;

  explicit PointwiseScratch(const PointwiseParams& p)
      : x_stride(round_up<C>(p.x.c)), x_size(p.tile_pixels * x_stride),
        left_size(Product<T>::left_size(p.tile_pixels, p.x.c)), out_size(p.tile_pixels * panel),
        vectors(ceil_div(p.y.c, kLanes<C>)) {}
  int64_t bytes() const { return (x_size + left_size + 2 * out_size) * sizeof(C) + vectors * sizeof(Sums<C>); }
};

// y = product + bias + added, and sums of it as stored, of one vector of channels. The product's rows are `stride` long.
template <class T, bool kSum>
void finish_vector(const compute_t<T>* product, int64_t stride, int64_t pixels, Vec<compute_t<T>> bias,
                   Tile<compute_t<T>> added, int64_t c, compute_t<T>* y, int64_t y_stride, int64_t ahead, int lanes,
                   bool choose_origin, Sums<compute_t<T>>& sums) {
  using C = compute_t<T>;
  const auto value = [&](int64_t pixel) EFFK_INLINE {
    const Vec<C> v = load(product + pixel * stride) + bias;
    return added.data ? v + added.at(pixel, c) : v;
  };
  if (choose_origin) sums.origin = origin_of<C>(Reduce::kStatistics, rounded<T>(value(0)));
  for (int64_t begin = 0; begin < pixels; begin += kRun) {
    Vec<C> sum{}, square{};
    for (int64_t pixel = begin; pixel < min64(begin + kRun, pixels); ++pixel) {
      const Vec<C> v = value(pixel);
      C* at = y + pixel * y_stride;
      __builtin_prefetch(at + ahead, 1);
      store_n(at, v, lanes);
      const Vec<C> deviation = rounded<T>(v) - sums.origin;
      sum += deviation;
      square += deviation * deviation;
    }
    if (!kSum) continue;
    sums.run_sum = sum;
    sums.run_square = square;
    sums.end_run();
  }
}

template <class T>
void run_forward(const PointwiseParams& p, int64_t unit, void* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const PointwiseScratch<T> layout(p);
  C* x_buffer = static_cast<C*>(scratch);
  C* left_buffer = x_buffer + layout.x_size;
  C* out = left_buffer + layout.left_size;
  C* residual = out + layout.out_size;
  Sums<C>* sums = reinterpret_cast<Sums<C>*>(residual + layout.out_size);
  const int64_t n = unit / p.bands, begin = unit % p.bands * p.band_pixels, map = p.y.h * p.y.w;
  const int64_t end = min64(begin + p.band_pixels, map);
  const C* gate = p.gate ? static_cast<const C*>(p.gate) + n * p.x.c : nullptr;
  const bool plain = !p.prologue.scale && p.prologue.activation == kIdentity && !gate;
  const Panels<C> panels(p.y.c);
  Activate<C> activate_x = nullptr;
  with_activation(p.prologue.activation, [&](auto act) { activate_x = &activate_tile<C, act>; });
  for (int64_t v = 0; v < layout.vectors; ++v) sums[v] = Sums<C>{};
  const Product<T> product(p.tile_pixels);

  for (int64_t first = begin; first < end; first += p.tile_pixels) {
    const int64_t pixels = min64(p.tile_pixels, end - first);
    Tile<C> x = load_tile<T>(p.x, n, first, pixels, 0, p.x.c, x_buffer);
    if (!plain) {
      activate_x(x, pixels, p.x.c, p.prologue, gate, x_buffer, layout.x_stride);
      x = {x_buffer, layout.x_stride, 0};
    }
    const Rows<C> left = Product<T>::left({x.data, x.stride, 1, p.x.c}, pixels, nullptr, left_buffer);
    for (int64_t i = 0; i < panels.count; ++i) {
      const int64_t c = panels.begin(i) * V, channels = min64(panels.vectors(i) * V, p.y.c - c);
      const bool last = i + 1 == panels.count;
      const Ahead<C> next = last && x.ahead ? Ahead<C>{x.data + x.ahead, x.ahead} : Ahead<C>{};
      product.store(left, pixels,
                    static_cast<const C*>(p.packed) + panels.begin(i) * Product<T>::column_vector(p.x.c),
                    panels.vectors(i), out, layout.panel, V, next);
      Tile<C> added{};
      if (p.residual.data) added = load_tile<T>(p.residual, n, first, pixels, c, channels, residual);
      // Straight to y where it holds what is computed, a pixel's channels side by side.
      const bool direct = std::is_same_v<T, C> && p.y.stride_c == 1;
      const int64_t stride = direct ? p.y.stride_w : layout.panel;
      C* y = direct ? static_cast<C*>(const_cast<void*>(p.y.data)) + n * p.y.stride_n + first * stride + c : out;
      const int64_t ahead = !direct ? 0 : last ? pixels * stride - c : channels;
      for (int64_t j = 0; j < channels; j += V) {
        const int lanes = static_cast<int>(min64(channels - j, V));
        const Vec<C> bias = lanes_of<C>(p.bias, c + j, lanes, 0);
        (p.reduce == Reduce::kNone ? &finish_vector<T, false> : &finish_vector<T, true>)(
            out + j, layout.panel, pixels, bias, added, j, y + j, stride, ahead, direct ? lanes : V,
            first == begin && p.reduce == Reduce::kStatistics, sums[(c + j) / V]);
      }
      if (!direct) store_tile<T>(p.y, n, first, pixels, c, channels, out, layout.panel);
    }
  }
  if (p.reduce == Reduce::kNone) return;
  for (int64_t c = 0; c < p.y.c; ++c) {
    const Sums<C>& s = sums[c / V];
    write_partial(p.partials, p.reduce, p.y.c, unit, c, s.origin[c % V], s.sum[c % V], s.square[c % V],
                  static_cast<double>(end - begin));
  }
}

template <class T>
void plan_forward(PointwiseParams& p) {
  using C = compute_t<T>;
  const int64_t map = p.y.h * p.y.w;
  p.tile_pixels = tile_pixels<C>(p.x.c, map);
  const int64_t tiles = ceil_div(map, p.tile_pixels), wanted = ceil_div(kMinUnits, max64(p.x.n, 1));
  p.band_pixels = ceil_div(tiles, min64(tiles, wanted)) * p.tile_pixels;
  p.bands = ceil_div(map, p.band_pixels);
  p.units = p.x.n * p.bands;
  p.packed_size = packed_size<Product<T>>(p.y.c, p.x.c) * sizeof(C);
  p.scratch_size = PointwiseScratch<T>(p).bytes();
}

// --- backward ---------------------------------------------------------------------------------------------------------

template <class T>
struct BackwardScratch {
  using C = compute_t<T>;
  static constexpr int64_t panel = kPanelVectors * kLanes<C>;
  int64_t dy_stride, dy_size, panel_size, left_size, transposed_size, right_size;

  explicit BackwardScratch(const PointwiseBackwardParams& p)
      : dy_stride(round_up<C>(p.y.c)), dy_size(p.tile_pixels * dy_stride), panel_size(p.tile_pixels * panel),
        left_size(Product<T>::left_size(p.tile_pixels, p.y.c)),
        transposed_size(Product<T>::left_size(p.y.c, p.tile_pixels)), right_size(Product<T>::right_size(p.tile_pixels)) {}
  int64_t bytes() const {
    return (2 * dy_size + 3 * panel_size + left_size + transposed_size + right_size) * sizeof(C);
  }
};

// dy of a tile: what is left of the gradient before the BatchNorm after y.
template <class T>
Tile<compute_t<T>> gradient_tile(const PointwiseBackwardParams& p, int64_t n, int64_t first, int64_t pixels,
                                 compute_t<T>* dy, int64_t stride, compute_t<T>* buffer) {
  using C = compute_t<T>;
  const Tile<C> grad = load_tile<T>(p.grad, n, first, pixels, 0, p.y.c, dy);
  if (!p.after.scale && !p.scale) return grad;
  Tile<C> y{};
  if (p.after.slope) y = load_tile<T>(p.y, n, first, pixels, 0, p.y.c, buffer);
  const C* scales = p.scale ? static_cast<const C*>(p.scale) + n * p.y.c : nullptr;
  for_blocks<C>(pixels, p.y.c, [&](int64_t c, int lanes, int64_t begin, int64_t end) EFFK_INLINE {
    const Vec<C> factor = lanes_of<C>(p.after.scale, c, lanes, 1) * lanes_of<C>(scales, c, lanes, 1);
    const Vec<C> mean = lanes_of<C>(p.after.mean, c, lanes, 0), slope = lanes_of<C>(p.after.slope, c, lanes, 0);
    const Vec<C> constant = lanes_of<C>(p.after.constant, c, lanes, 0);
    for (int64_t i = begin; i < end; ++i) {
      Vec<C> d = grad.at(i, c) * factor;
      if (y.data) d += (y.at(i, c) - mean) * slope + constant;
      store(dy + i * stride + c, d);
    }
  });
  return {dy, stride, 0};
}

// Of a panel of `channels` from c on: h * gate as [pixels][vectors][lanes], and the sums [3][C] of g * h, g * act' and
// g * act' * (x - mean) where `g` is given.
template <class C>
using Panel = void (*)(const NormBackward& norm, const C* gate, int64_t c, int64_t channels, Tile<C> x, const C* g,
                       int64_t g_stride, int64_t pixels, C* h, C* sums, int64_t sums_stride);

template <class C, int A>
void activate_panel(const NormBackward& norm, const C* gate, int64_t c, int64_t channels, Tile<C> x, const C* g,
                    int64_t g_stride, int64_t pixels, C* h, C* sums, int64_t sums_stride) {
  constexpr int V = kLanes<C>;
  const int64_t stride = round_up<C>(channels);
  for (int64_t j = 0; j < channels; j += V) {
    const int lanes = static_cast<int>(min64(channels - j, V));
    const Vec<C> scale = lanes_of<C>(norm.scale, c + j, lanes, 1), shift = lanes_of<C>(norm.shift, c + j, lanes, 0);
    const Vec<C> mean = lanes_of<C>(norm.mean, c + j, lanes, 0), gates = lanes_of<C>(gate, c + j, lanes, 1);
    Vec<C> of_h{}, of_slope{}, of_x{};
    for (int64_t i = 0; i < pixels; ++i) {
      const Vec<C> value = x.at(i, j);
      Vec<C> activated, slope;
      activate_with_slope<A>(value * scale + shift, activated, slope);
      store(h + i * stride + j, activated * gates);
      if (!g) continue;
      const Vec<C> grad = load(g + i * g_stride + j);
      of_h += grad * activated;
      of_slope += grad * slope;
      of_x += grad * slope * (value - mean);
    }
    if (!g) continue;
    store_n(sums + c + j, of_h, lanes);
    store_n(sums + sums_stride + c + j, of_slope, lanes);
    store_n(sums + 2 * sums_stride + c + j, of_x, lanes);
  }
}

template <class T>
void run_backward(const PointwiseBackwardParams& p, int64_t unit, void* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const BackwardScratch<T> layout(p);
  const int64_t outputs = p.y.c, channels = p.x.c, map = p.x.h * p.x.w, panel = layout.panel;
  C* dy_buffer = static_cast<C*>(scratch);
  C* y_buffer = dy_buffer + layout.dy_size;
  C* x_buffer = y_buffer + layout.dy_size;
  C* g = x_buffer + layout.panel_size;
  C* h = g + layout.panel_size;
  C* left_buffer = h + layout.panel_size;
  C* transposed_buffer = left_buffer + layout.left_size;
  C* right_buffer = transposed_buffer + layout.transposed_size;
  Panel<C> activate_x = nullptr;
  with_activation(p.before.activation, [&](auto act) { activate_x = &activate_panel<C, act>; });
  const Panels<C> panels(channels);
  const int64_t part = unit / p.groups, group = unit % p.groups, tiles = p.x.n * p.image_tiles;
  const int64_t begin = part * tiles / p.parts, end = (part + 1) * tiles / p.parts;
  const int64_t first_panel = group * panels.count / p.groups, end_panel = (group + 1) * panels.count / p.groups;
  C* products = static_cast<C*>(p.products) + part * outputs * p.padded;
  const Product<T> product(p.tile_pixels);

  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t n = tile / p.image_tiles, first = tile % p.image_tiles * p.tile_pixels;
    const int64_t pixels = min64(p.tile_pixels, map - first);
    const C* gate = p.gate ? static_cast<const C*>(p.gate) + n * channels : nullptr;
    C* sums = p.sums ? static_cast<C*>(p.sums) + tile * 3 * channels : nullptr;
    const Tile<C> dy = gradient_tile<T>(p, n, first, pixels, dy_buffer, layout.dy_stride, y_buffer);
    // No rows are made that nobody multiplies.
    const Rows<C> left = Product<T>::left({dy.data, dy.stride, 1, outputs}, p.grad_gated.data ? pixels : 0, nullptr,
                                          left_buffer);
    const Rows<C> transposed = Product<T>::left({dy.data, 1, dy.stride, pixels}, p.need_weight ? outputs : 0, nullptr,
                                                transposed_buffer);
    for (int64_t i = first_panel; i < end_panel; ++i) {
      const int64_t c = panels.begin(i) * V, here = min64(panels.vectors(i) * V, channels - c);
      const int vectors = panels.vectors(i);
      if (p.grad_gated.data) {
        product.store(left, pixels,
                      static_cast<const C*>(p.packed) + panels.begin(i) * Product<T>::column_vector(outputs), vectors, g,
                      panel, V);
        const int64_t next = i + 1 < end_panel ? here : pixels * channels + panels.begin(first_panel) * V - c;
        store_tile<T>(p.grad_gated, n, first, pixels, c, here, g, panel, next);
        if (sizeof(T) < sizeof(C))
          for (int64_t j = 0; j < pixels * panel; j += V) store(g + j, rounded<T>(load(g + j)));
      }
      if (!sums && !p.need_weight) continue;
      const Tile<C> x = load_tile<T>(p.x, n, first, pixels, c, here, x_buffer);
      activate_x(p.before, gate, c, here, x, sums ? g : nullptr, panel, pixels, h, sums, channels);
      if (!p.need_weight) continue;
      const C* right = Product<T>::right(h, pixels, vectors, right_buffer);
      if (tile == begin)
        product.store(transposed, outputs, right, vectors, products + c, p.padded, V);
      else
        product.add(transposed, outputs, right, vectors, products + c, p.padded, V);
    }
  }
}

// Units are parts of the pixels, whose products are summed afterwards, times groups of panels, which each go through the
// gradient again: parts where products are small, groups where they are large.
template <class T>
void plan_backward(PointwiseBackwardParams& p) {
  using C = compute_t<T>;
  constexpr int64_t kProducts = 1 << 18;  // of all parts
  const int64_t map = p.x.h * p.x.w;
  p.tile_pixels = tile_pixels<C>(p.y.c, map);
  p.image_tiles = ceil_div(map, p.tile_pixels);
  const int64_t tiles = p.x.n * p.image_tiles;
  p.parts = min64(tiles, max64(min64(kProducts / (p.y.c * p.x.c), kMinUnits), 1));
  p.groups = min64(Panels<C>(p.x.c).count, ceil_div(kMinUnits, max64(p.parts, 1)));
  p.units = p.parts * p.groups;
  p.packed_size = p.grad_gated.data ? packed_size<Product<T>>(p.x.c, p.y.c) * sizeof(C) : 0;
  p.scratch_size = BackwardScratch<T>(p).bytes();
  p.padded = round_up<C>(p.x.c);
  p.products_size = p.need_weight ? p.parts * p.y.c * p.padded * sizeof(C) : 0;
}

// The weight [depth, columns] as `pack_weight` leaves its transpose: `count` rows from `first` on.
template <class T>
void pack_backward(const PointwiseBackwardParams& p, int64_t first, int64_t count) {
  using C = compute_t<T>;
  const int64_t columns = p.x.c;
  pack_panels<Product<T>>(columns, p.y.c, first, count, static_cast<C*>(p.packed),
                          [&](int64_t k, int64_t n, int64_t column, int lanes, C* out, int64_t stride) {
    const T* from = static_cast<const T*>(p.weight) + (first + k) * columns + column;
    for (int64_t i = 0; i < n; ++i) store(out + i * stride, load_n(from + i * columns, lanes));
  });
}

}  // namespace

namespace EFFK_ISA {

void pointwise_plan(PointwiseParams& p) {
  with_product_storage(p.dtype, [&](auto storage) { plan_forward<decltype(storage)>(p); });
}

void pointwise_pack(const PointwiseParams& p, int64_t begin, int64_t end) {
  with_product_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    const int64_t depth = p.x.c, first = begin * kPackDepth, count = min64(end * kPackDepth, depth) - first;
    pack_weight<Product<T>>(static_cast<const T*>(p.weight) + first, depth, 1, p.y.c, depth, first, count,
                            static_cast<compute_t<T>*>(p.packed));
  });
}

void pointwise_run(const PointwiseParams& p, int64_t first, int64_t last, void* scratch) {
  with_product_storage(p.dtype, [&](auto storage) {
    for (int64_t i = first; i < last; ++i) run_forward<decltype(storage)>(p, i, scratch);
  });
}

void pointwise_backward_plan(PointwiseBackwardParams& p) {
  with_product_storage(p.dtype, [&](auto storage) { plan_backward<decltype(storage)>(p); });
}

void pointwise_backward_pack(const PointwiseBackwardParams& p, int64_t begin, int64_t end) {
  with_product_storage(p.dtype, [&](auto storage) {
    const int64_t first = begin * kPackDepth;
    pack_backward<decltype(storage)>(p, first, min64(end * kPackDepth, p.y.c) - first);
  });
}

void pointwise_backward_run(const PointwiseBackwardParams& p, int64_t first, int64_t last, void* scratch) {
  with_product_storage(p.dtype, [&](auto storage) {
    for (int64_t i = first; i < last; ++i) run_backward<decltype(storage)>(p, i, scratch);
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
