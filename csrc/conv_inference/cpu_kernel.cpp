#include "cpu_kernel.h"

#include <cstring>

#include "matmul.h"
#include "pixels.h"

namespace effk {
namespace {

constexpr int64_t kRectPixels = 128;  // of a unit, or more: the weight is read once for them
constexpr int64_t kBlockPixels = 64;   // whose products stay in the first-level cache until they are stored

// f(T{}, P) for the storage type T and the product P, as a null pointer: the plain one where the other's operands would be
// padding for the most part.
template <class F>
void with_product(const ConvParams& p, F f) {
  with_product_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    if (Product<T>::padded(p.x.c) > 2 * p.x.c)
      f(storage, static_cast<PlainProduct<T>*>(nullptr));
    else
      f(storage, static_cast<Product<T>*>(nullptr));
  });
}

template <class P>
int64_t depth_of(const ConvParams& p) {
  return p.kernel_h * p.kernel_w * P::padded(p.x.c);
}

// The pixels of x under a rectangle of output pixels, padded: [rows][width][pixel], each a left operand.
template <class P>
struct Window {
  int64_t rows, width, pixel;

  explicit Window(const ConvParams& p)
      : rows((p.rect_h - 1) * p.stride + p.kernel_h), width((p.rect_w - 1) * p.stride + p.kernel_w),
        pixel(P::row(p.x.c)) {}
};

// Whether x can be read as it lies.
template <class P>
bool is_direct(const ConvParams& p) {
  return P::takes(p.x) && p.kernel_h == 1 && p.kernel_w == 1 && p.pad_top == 0 && p.pad_left == 0;
}

// `buffer` has room for a row of values.
template <class T, class P>
void stage(const ConvParams& p, int64_t n, int64_t top, int64_t left, const Window<P>& window, compute_t<T>* out,
           compute_t<T>* buffer) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const Map& x = p.x;
  const int64_t begin = min64(max64(-left, 0), window.width), end = max64(min64(x.w - left, window.width), begin);
  const int64_t columns = end - begin, row = window.width * window.pixel;
  for (int64_t i = 0; i < window.rows; ++i) {
    C* staged = out + i * row;
    if (top + i < 0 || top + i >= x.h) {
      std::memset(staged, 0, row * sizeof(C));
      continue;
    }
    std::memset(staged, 0, begin * window.pixel * sizeof(C));
    std::memset(staged + end * window.pixel, 0, (window.width - end) * window.pixel * sizeof(C));
    staged += begin * window.pixel;
    if constexpr (P::kOwnOperands)
      if (x.stride_c == 1) {
        P::left(row_of<T>(x, n, 0, top + i) + (left + begin) * x.stride_w, x.stride_w, x.c, columns, staged);
        continue;
      }
    C* to = P::kOwnOperands ? buffer : staged;
    const bool dense = x.stride_c == 1 && x.stride_w == x.c;
    if (dense) {
      const T* from = row_of<T>(x, n, 0, top + i) + (left + begin) * x.c;
      for (int64_t j = 0; j < columns * x.c; j += V) {
        const int lanes = static_cast<int>(min64(columns * x.c - j, V));
        store_n(to + j, load_n(from + j, lanes), lanes);
      }
    }
    for (int64_t c = 0; !dense && c < x.c; c += V) {
      const int lanes = static_cast<int>(min64(x.c - c, V));
      const T* from = row_of<T>(x, n, c, top + i) + (left + begin) * x.stride_w;
      if (x.stride_c == 1) {
        for (int64_t j = 0; j < columns; ++j) store_n(to + j * x.c + c, load_n(from + j * x.stride_w, lanes), lanes);
        continue;
      }
      for (int64_t j = 0; j < columns; j += V) {
        const int pixels = static_cast<int>(min64(columns - j, V));
        C block[V * V];
        load_pixels(from + j * x.stride_w, x.stride_w, x.stride_c, pixels, lanes, block);
        for (int l = 0; l < pixels; ++l) store_n(to + (j + l) * x.c + c, load(block + l * V), lanes);
      }
    }
    P::left({to, x.c, 1, x.c}, columns, nullptr, staged);
  }
}

template <class T, class P>
void run_unit(const ConvParams& p, int64_t unit, compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int64_t share = unit % p.shares, rect = unit / p.shares % p.rects, n = unit / p.shares / p.rects;
  const int64_t across = ceil_div(p.out_w, p.rect_w), first_row = rect / across * p.rect_h;
  const int64_t first_column = rect % across * p.rect_w;
  const Panels<C> panels(p.out_c);
  const Window<P> window(p);
  const int64_t depth = depth_of<P>(p);
  const C *weight = static_cast<const C*>(p.packed), *norm = weight + packed_size<P>(p.out_c, depth);
  const Finish<C> finish = finish_for<T>(p.activation);
  const Output y{p.y, p.out_c, p.out_h, p.out_w, p.channels_last, p.has_shortcut ? &p.shortcut : nullptr};
  const int64_t rows = min64(p.rect_h, p.out_h - first_row), columns = min64(p.rect_w, p.out_w - first_column);
  const int64_t top = first_row * p.stride - p.pad_top, left = first_column * p.stride - p.pad_left;
  C *raw = scratch, *buffer = raw + kPanelVectors * kBlockPixels * V, *staged = buffer + window.width * p.x.c;
  if (!is_direct<P>(p)) stage<T, P>(p, n, top, left, window, staged, buffer);
  const P product(min64(columns, kBlockPixels));
  auto operand = [&](int64_t row, int64_t column) -> Rows<C> {
    if (is_direct<P>(p))
      return P::in_place(row_of<T>(p.x, n, 0, top + row * p.stride) + (left + column * p.stride) * p.x.stride_w,
                         p.stride * p.x.stride_w, p.x.stride_c, p.x.c);
    const int64_t line = window.width * window.pixel;
    return {staged + row * p.stride * line + column * p.stride * window.pixel, p.stride * window.pixel, 1,
            p.kernel_h * p.kernel_w * window.pixel, p.kernel_w * window.pixel, line};
  };
  for (int64_t i = share * panels.count / p.shares; i < (share + 1) * panels.count / p.shares; ++i) {
    const int vectors = panels.vectors(i);
    const C* panel = weight + panels.begin(i) * P::column_vector(depth);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns; column += kBlockPixels) {
        const int64_t count = min64(columns - column, kBlockPixels);
        const int64_t pixel = (first_row + row) * p.out_w + first_column + column;
        product.store(operand(row, column), count, panel, vectors, raw, V, kBlockPixels * V);
        for (int v = 0; v < vectors; ++v) {
          C* block = raw + v * kBlockPixels * V;
          finish(block, block, count, packed_scale(norm, p.out_c, panels.begin(i) + v));
          store_pixels<T>(y, n, pixel, count, panels.begin(i) + v, block);
        }
      }
  }
}

// Makes one row of a map whose rows follow each other.
inline bool join_rows(Map& m) {
  if (m.h > 1 && m.stride_h != m.w * m.stride_w) return false;
  m.w *= m.h;
  m.h = 1;
  return true;
}

template <class T, class P>
void plan(ConvParams& p, int64_t threads) {
  using C = compute_t<T>;
  if (p.kernel_h == 1 && p.kernel_w == 1 && p.stride == 1 && p.out_h == p.x.h && p.out_w == p.x.w) {
    Map x = p.x, shortcut = p.shortcut;
    if (join_rows(x) && (!p.has_shortcut || join_rows(shortcut))) {
      p.x = x, p.shortcut = shortcut;
      p.out_w *= p.out_h, p.out_h = 1;
    }
  }
  // A row at a time, or several short ones, or a part of one that has no neighbours.
  p.rect_w = p.out_h == 1 ? min64(p.out_w, kRectPixels) : p.out_w;
  p.rect_h = min64(ceil_div(kRectPixels, p.out_w), p.out_h);
  p.rects = ceil_div(p.out_h, p.rect_h) * ceil_div(p.out_w, p.rect_w);
  p.shares = best_split(p.x.n * p.rects, Panels<C>(p.out_c).count, 0, 1, threads);
  p.units = p.x.n * p.rects * p.shares;
  const Window<P> window(p);
  p.scratch_size = kPanelVectors * kBlockPixels * kLanes<C> + window.width * p.x.c;
  if (!is_direct<P>(p)) p.scratch_size += (window.rows * window.width + p.stride * P::kSlack) * window.pixel;
}

// --- Winograd's F(2x2, 3x3) -----------------------------------------------------------------------------------------------
//
// A tile of 2 x 2 output pixels takes 16 products of channels instead of 36: of the sums B^T x B of its 4 x 4 pixels and
// G w G^T of the weights, which A^T . A combines (Lavin and Gray, 2016, section 4.1). Sums are over the channels only, a
// ninth of the direct form's, so that the result is at least as exact. A rectangle is whole rows of tiles.

constexpr int kParts = 16;

inline bool is_winograd(const ConvParams& p) {
  return p.dtype == Dtype::kFloat32 && p.kernel_h == 3 && p.kernel_w == 3 && p.stride == 1 && p.x.c >= 16 && p.out_c >= 16;
}

struct WinogradScratch {
  int64_t tiles, x, sums, products, rows, size;

  explicit WinogradScratch(const ConvParams& p) {
    constexpr int64_t V = kLanes<float>;
    const Window<PlainProduct<float>> window(p);
    tiles = p.rect_h * p.rect_w / 4;
    x = window.width * p.x.c;  // after the row that `stage` converts
    sums = x + window.rows * window.width * p.x.c;
    products = sums + kParts * tiles * p.x.c;
    rows = products + kParts * tiles * kPanelVectors * V;
    size = rows + 2 * p.rect_w * V;
  }
};

// The parts of the weight, each packed, and the BatchNorm.
inline int64_t winograd_packed_size(const ConvParams& p) {
  return kParts * packed_size<PlainProduct<float>>(p.out_c, p.x.c) + 2 * round_up<float>(p.out_c);
}

// Row `i` of G times a column of a 3 x 3 kernel.
inline EFFK_INLINE VecF winograd_row(int i, VecF a, VecF b, VecF c) {
  return i == 0 ? a : i == 1 ? 0.5f * (a + c + b) : i == 2 ? 0.5f * (a + c - b) : c;
}

// G w G^T of each kernel, element by element.
inline void winograd_pack(const ConvParams& p, const ConvWeight& w, float* packed, int64_t begin, int64_t end) {
  using P = PlainProduct<float>;
  constexpr int V = kLanes<float>, kTaps = 9, kDepth = 2 * V;  // which `fill` is asked for at most
  const int64_t size = packed_size<P>(p.out_c, p.x.c), ahead = kPanelVectors * V;
  pack_panels<P>(p.out_c, p.x.c, 0, p.x.c, packed,
                 [&](int64_t k, int64_t n, int64_t column, int columns, float* out, int64_t stride) {
    // [kDepth][kTaps] or [kTaps][kDepth] vectors, as the weight has them.
    float taps[kDepth * kTaps * V];
    const float* from = static_cast<const float*>(w.data) + column * w.out + k * w.channel;
    const bool dense = w.column == 1 && w.row == 3 && w.channel == kTaps;
    const int64_t channel = dense ? kTaps * V : V, tap = dense ? V : kDepth * V;
    if (dense)
      transpose_rows(from, w.out, 1, columns, n * kTaps, ahead, taps, V);
    else
      for (int t = 0; t < kTaps; ++t)
        transpose_rows(from + t / 3 * w.row + t % 3 * w.column, w.out, w.channel, columns, n, ahead, taps + t * tap, V);
    for (int64_t i = 0; i < n; ++i) {
      VecF g[kTaps];
#pragma GCC unroll 9
      for (int t = 0; t < kTaps; ++t) g[t] = load(taps + i * channel + t * tap);
#pragma GCC unroll 16
      for (int part = 0; part < kParts; ++part) {
        VecF column_of[3];
#pragma GCC unroll 3
        for (int x = 0; x < 3; ++x) column_of[x] = winograd_row(part / 4, g[x], g[3 + x], g[6 + x]);
        store(out + part * size + i * stride, winograd_row(part % 4, column_of[0], column_of[1], column_of[2]));
      }
    }
  }, begin, end);
}

inline void winograd_plan(ConvParams& p, int64_t threads) {
  constexpr int64_t kTiles = 64;  // or more, so that each part of the weight is read once for them
  p.rect_w = (p.out_w + 1) / 2 * 2;
  const int64_t most = (p.out_h + 1) / 2, wanted = ceil_div(2 * kTiles, p.rect_w);
  p.rect_h = 2 * ceil_div(most, ceil_div(most, min64(wanted, most)));
  p.rects = ceil_div(p.out_h, p.rect_h);
  p.shares = best_split(p.x.n * p.rects, Panels<float>(p.out_c).count, 0, 1, threads);
  p.units = p.x.n * p.rects * p.shares;
  p.scratch_size = WinogradScratch(p).size;
}

// B^T x B of one vector of channels of each tile: [parts][tiles][C].
inline void winograd_sums(const ConvParams& p, const float* x, int64_t width, int64_t tiles, float* out) {
  const int64_t channels = p.x.c, across = p.rect_w / 2;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const float* corner = x + (tile / across * 2 * width + tile % across * 2) * channels;
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
      const int lanes = static_cast<int>(min64(channels - c, kLanes<float>));
      VecF half[4][4];  // B^T x
#pragma GCC unroll 4
      for (int column = 0; column < 4; ++column) {
        VecF v[4];
#pragma GCC unroll 4
        for (int row = 0; row < 4; ++row) v[row] = load_n(corner + (row * width + column) * channels + c, lanes);
        half[0][column] = v[0] - v[2], half[1][column] = v[1] + v[2];
        half[2][column] = v[2] - v[1], half[3][column] = v[1] - v[3];
      }
      float* to = out + tile * channels + c;
      const int64_t part = tiles * channels;
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row, to += 4 * part) {
        const VecF* h = half[row];
        store_n(to, h[0] - h[2], lanes);
        store_n(to + part, h[1] + h[2], lanes);
        store_n(to + 2 * part, h[2] - h[1], lanes);
        store_n(to + 3 * part, h[1] - h[3], lanes);
      }
    }
  }
}

// A^T . A of one vector of channels of a row of tiles: two rows of pixels.
inline void winograd_pixels(const float* products, int64_t part, int64_t across, float* rows) {
  constexpr int V = kLanes<float>;
  for (int64_t tile = 0; tile < across; ++tile) {
    VecF half[2][4];  // A^T m
#pragma GCC unroll 4
    for (int column = 0; column < 4; ++column) {
      VecF v[4];
#pragma GCC unroll 4
      for (int row = 0; row < 4; ++row) v[row] = load(products + (row * 4 + column) * part + tile * V);
      half[0][column] = v[0] + v[1] + v[2], half[1][column] = v[1] - v[2] - v[3];
    }
#pragma GCC unroll 2
    for (int row = 0; row < 2; ++row) {
      const VecF* h = half[row];
      float* to = rows + (row * across + tile) * 2 * V;
      store(to, h[0] + h[1] + h[2]);
      store(to + V, h[1] - h[2] - h[3]);
    }
  }
}

inline void winograd_unit(const ConvParams& p, int64_t unit, float* scratch) {
  constexpr int V = kLanes<float>;
  using P = PlainProduct<float>;
  const int64_t share = unit % p.shares, rect = unit / p.shares % p.rects, n = unit / p.shares / p.rects;
  const int64_t first_row = rect * p.rect_h, across = p.rect_w / 2, channels = p.x.c;
  const int64_t rows = min64(p.rect_h, p.out_h - first_row), tiles = ceil_div(rows, 2) * across;
  const Panels<float> panels(p.out_c);
  const Window<P> window(p);
  const WinogradScratch at(p);
  const int64_t part_size = packed_size<P>(p.out_c, channels);
  const float *weight = static_cast<const float*>(p.packed), *norm = weight + kParts * part_size;
  const Finish<float> finish = finish_for<float>(p.activation);
  const Output y{p.y, p.out_c, p.out_h, p.out_w, p.channels_last, p.has_shortcut ? &p.shortcut : nullptr};
  float *x = scratch + at.x, *sums = scratch + at.sums, *products = scratch + at.products, *block = scratch + at.rows;
  stage<float, P>(p, n, first_row - p.pad_top, -p.pad_left, window, x, scratch);
  winograd_sums(p, x, window.width, tiles, sums);
  const P product(tiles);
  for (int64_t i = share * panels.count / p.shares; i < (share + 1) * panels.count / p.shares; ++i) {
    const int vectors = panels.vectors(i);
    const int64_t part = vectors * tiles * V;
    for (int64_t j = 0; j < kParts; ++j)
      product.store({sums + j * tiles * channels, channels, 1, channels}, tiles,
                    weight + j * part_size + panels.begin(i) * P::column_vector(channels), vectors, products + j * part, V,
                    tiles * V);
    for (int v = 0; v < vectors; ++v)
      for (int64_t row = 0; row < rows; row += 2) {
        winograd_pixels(products + (v * tiles + row / 2 * across) * V, part, across, block);
        for (int64_t r = 0; r < min64(rows - row, 2); ++r) {
          float* pixels = block + r * p.rect_w * V;
          finish(pixels, pixels, p.out_w, packed_scale(norm, p.out_c, panels.begin(i) + v));
          store_pixels<float>(y, n, (first_row + row + r) * p.out_w, p.out_w, panels.begin(i) + v, pixels);
        }
      }
  }
}

}  // namespace

namespace EFFK_ISA {

int64_t conv_packed_size(const ConvParams& p) {
  if (is_winograd(p)) return winograd_packed_size(p);
  int64_t size = 0;
  with_product(p, [&](auto storage, auto* product) {
    using T = decltype(storage);
    using P = std::remove_pointer_t<decltype(product)>;
    size = packed_size<P>(p.out_c, depth_of<P>(p)) + 2 * round_up<compute_t<T>>(p.out_c);
  });
  return size;
}

// Panels.
int64_t conv_pack_units(const ConvParams& p) {
  int64_t units = 0;
  with_product_storage(p.dtype, [&](auto storage) { units = Panels<compute_t<decltype(storage)>>(p.out_c).count; });
  return units;
}

void conv_pack(const ConvParams& p, const ConvWeight& w, const Affine& norm, void* packed, int64_t first, int64_t last) {
  with_product(p, [&](auto storage, auto* product) {
    using T = decltype(storage);
    using C = compute_t<T>;
    using P = std::remove_pointer_t<decltype(product)>;
    C* to = static_cast<C*>(packed);
    if (first == 0) pack_norm(norm, p.out_c, to + conv_packed_size(p) - 2 * round_up<C>(p.out_c));
    if constexpr (std::is_same_v<T, float>)
      if (is_winograd(p)) return winograd_pack(p, w, to, first, last);
    for (int64_t t = 0; t < p.kernel_h * p.kernel_w; ++t)
      pack_weight<P>(static_cast<const T*>(w.data) + t / p.kernel_w * w.row + t % p.kernel_w * w.column, w.out, w.channel,
                     p.out_c, depth_of<P>(p), t * P::padded(p.x.c), p.x.c, to, first, last);
  });
}

void conv_plan(ConvParams& p, int64_t threads) {
  if (is_winograd(p)) return winograd_plan(p, threads);
  with_product(p, [&](auto storage, auto* product) {
    plan<decltype(storage), std::remove_pointer_t<decltype(product)>>(p, threads);
  });
}

void conv_run(const ConvParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  if (is_winograd(p)) {
    for (int64_t unit = first_unit; unit < last_unit; ++unit) winograd_unit(p, unit, static_cast<float*>(scratch));
    return;
  }
  with_product(p, [&](auto storage, auto* product) {
    using T = decltype(storage);
    using P = std::remove_pointer_t<decltype(product)>;
    for (int64_t unit = first_unit; unit < last_unit; ++unit)
      run_unit<T, P>(p, unit, static_cast<compute_t<T>*>(scratch));
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
