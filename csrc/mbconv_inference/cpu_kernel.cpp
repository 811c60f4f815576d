#include "cpu_kernel.h"

#include "../squeeze_excite/gate.h"
#include "depthwise.h"
#include "matmul.h"
#include "pixels.h"

namespace effk {
namespace {

// --- where things lie -------------------------------------------------------------------------------------------------

// The packed weights, in elements; scales and shifts are padded to whole vectors.
template <class C>
struct Packed {
  int64_t expand, norm1, depthwise, norm2, gate, project, norm3, size;

  explicit Packed(const MbconvParams& p) {
    const int64_t hidden = round_up<C>(p.hidden), taps = p.kernel_size * p.kernel_size;
    expand = 0;
    norm1 = expand + (p.has_expand ? packed_size<C>(p.hidden, p.x.c) : 0);
    depthwise = norm1 + (p.has_expand ? 2 * hidden : 0);
    norm2 = depthwise + hidden * taps;
    gate = norm2 + 2 * hidden;
    project = gate + (p.squeezed ? GateLayout<C>(p.hidden, p.squeezed).size : 0);
    norm3 = project + packed_size<C>(p.out_c, p.hidden);
    size = norm3 + 2 * round_up<C>(p.out_c);
  }
};

// What the phases hand on for one image, in elements: d as planes of one vector of channels, [vectors][pixels][lanes],
// its sums over each band [bands][channels], and the gates [channels].
template <class C>
struct Image {
  int64_t plane, sums, gates, size;

  explicit Image(const MbconvParams& p) {
    const int64_t hidden = round_up<C>(p.hidden);
    plane = odd_lines(p.out_h * p.out_w) * kLanes<C>;
    sums = hidden / kLanes<C> * plane;
    gates = sums + p.bands * hidden;
    size = gates + hidden;
  }
};

// --- expand and depthwise ---------------------------------------------------------------------------------------------
//
// A unit is one image, a panel of expanded channels and a band of output rows. The rows of e that the current output row
// needs stand in a ring in scratch, activated and padded with zero columns: [vectors][slots][width][lanes]. So e never
// reaches memory, no pixel of it is computed twice within a band, and no tap has a bounds check.

constexpr int64_t kGroupPixels = 48;  // expanded at once, where rows are shorter: fills tiles, and reuses the weights

template <class C>
struct Ring {
  int64_t rows;                     // of the map, expanded at once
  int64_t slots, width, left, columns;
  int64_t ring;                     // of one vector of channels
  int64_t line;                     // of one vector: `rows` raw rows of e, or one of d
  int64_t staged;                   // of x
  int64_t size;

  Ring(const MbconvParams& p, bool staging) {
    rows = p.has_expand ? min64(ceil_div(kGroupPixels, p.x.w), p.x.h) : 1;
    slots = p.kernel_size + rows - 1;
    width = padded_width(p.out_w, p.kernel_size, p.stride);
    left = min64(p.pad_left, width);
    columns = min64(p.x.w, width - left);
    ring = odd_lines(slots * width) * kLanes<C>;
    line = odd_lines(max64(rows * p.x.w, width_in_tiles(p.out_w))) * kLanes<C>;
    staged = staging ? rows * p.x.w * p.x.c : 0;
    size = kPanelVectors * (ring + line) + round_up<C>(staged);
  }
};

template <class C>
ConvRow<C> conv_row_for(const MbconvParams& p) {
  const bool one = p.stride == 1;
  switch (p.kernel_size) {
    case 3: return one ? conv_row_of<C, 3, 1>(p.out_w) : conv_row_of<C, 3, 2>(p.out_w);
    case 5: return one ? conv_row_of<C, 5, 1>(p.out_w) : conv_row_of<C, 5, 2>(p.out_w);
    default: return one ? conv_row_of<C, 7, 1>(p.out_w) : conv_row_of<C, 7, 2>(p.out_w);
  }
}

// Whether the rows of x must be converted, or joined, before they can be multiplied.
template <class T>
bool needs_staging(const MbconvParams& p) {
  const bool joined = p.x.w >= kGroupPixels || p.x.h == 1 || p.x.stride_h == p.x.w * p.x.stride_w;
  return p.has_expand && !(std::is_same_v<T, compute_t<T>> && joined);
}

// `rows` rows of x as the left operand of a product.
template <class T>
Rows<compute_t<T>> input_rows(const MbconvParams& p, const T* x, int64_t rows, compute_t<T>* staged) {
  using C = compute_t<T>;
  const Map& m = p.x;
  if constexpr (std::is_same_v<T, C>)
    if (!needs_staging<T>(p)) return {x, m.stride_w, m.stride_c, m.c};
  auto convert = [&](const T* in, int64_t stride, int64_t n, C* out) {
    for (int64_t i = 0; i < n; i += kLanes<C>) {
      const int lanes = static_cast<int>(min64(n - i, kLanes<C>));
      store_n(out + i, stride == 1 ? load_n(in + i, lanes) : load_strided(in + i * stride, stride, lanes), lanes);
    }
  };
  for (int64_t row = 0; row < rows; ++row) {
    if (m.stride_c == 1)  // [pixels][channels]
      for (int64_t column = 0; column < m.w; ++column)
        convert(x + row * m.stride_h + column * m.stride_w, 1, m.c, staged + (row * m.w + column) * m.c);
    else  // [channels][pixels]
      for (int64_t c = 0; c < m.c; ++c)
        convert(x + row * m.stride_h + c * m.stride_c, m.stride_w, m.w, staged + (c * rows + row) * m.w);
  }
  if (m.stride_c == 1) return {staged, m.c, 1, m.c};
  return {staged, 1, rows * m.w, m.c};
}

template <class T>
void expand_depthwise(const MbconvParams& p, int64_t n, int64_t chunk, int64_t band, compute_t<T>* image,
                      compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const Packed<C> at(p);
  const Image<C> im(p);
  const Panels<C> panels(p.hidden);
  const Ring<C> r(p, needs_staging<T>(p));
  const C* packed = static_cast<const C*>(p.packed);
  const int vectors = panels.vectors(chunk), k = p.kernel_size;
  const int64_t first = panels.begin(chunk), taps = k * k;
  const Finish<C> finish1 = finish_for<C>(p.act1), finish2 = finish_for<C>(p.act2);
  const ConvRow<C> conv = conv_row_for<C>(p);
  C *rings = scratch, *lines = rings + kPanelVectors * r.ring, *staged_x = lines + kPanelVectors * r.line;
  Vec<C> sums[kPanelVectors] = {};
  for (int64_t i = 0; i < vectors * r.ring; i += V) store(rings + i, Vec<C>{});

  const int64_t row_end = min64((band + 1) * p.band_rows, p.out_h);
  const int64_t last = min64((row_end - 1) * p.stride - p.pad_top + k, p.x.h);
  int64_t staged = max64(band * p.band_rows * p.stride - p.pad_top, 0);
  auto slot = [&](int v, int64_t row) { return rings + v * r.ring + row % r.slots * r.width * V; };
  for (int64_t row = band * p.band_rows; row < row_end; ++row) {
    const int64_t top = row * p.stride - p.pad_top, bottom = min64(top + k, p.x.h);
    for (staged = max64(staged, top); staged < bottom;) {
      const int64_t rows = min64(r.rows, last - staged);
      if (p.has_expand) {
        const T* x = row_of<T>(p.x, n, 0, staged);
        multiply<C>(input_rows<T>(p, x, rows, staged_x), rows * p.x.w, packed + at.expand + panels.offset(chunk, p.x.c),
                    vectors, lines, V, r.line);
        for (int v = 0; v < vectors; ++v) {
          const Scale<C> scale = packed_scale(packed + at.norm1, p.hidden, first + v);
          for (int64_t i = 0; i < rows; ++i)
            finish1(lines + v * r.line + i * p.x.w * V, slot(v, staged + i) + r.left * V, r.columns, scale);
        }
      } else {
        for (int v = 0; v < vectors; ++v) {
          const int64_t c = (first + v) * V;
          load_pixels(row_of<T>(p.x, n, c, staged), p.x.stride_w, p.x.stride_c, r.columns,
                      static_cast<int>(min64(p.x.c - c, V)), slot(v, staged) + r.left * V);
        }
      }
      staged += rows;
    }
    const int ky_begin = static_cast<int>(min64(max64(-top, 0), k));
    const int ky_end = static_cast<int>(max64(bottom - top, ky_begin));
    for (int v = 0; v < vectors; ++v) {
      const C* window[kMaxKernelSize];
      for (int ky = ky_begin; ky < ky_end; ++ky) window[ky] = slot(v, top + ky);
      conv(window, ky_begin, ky_end, packed + at.depthwise + (first + v) * taps * V,
           ceil_div(p.out_w, tile_of(p.out_w)), lines);
      C* d = image + (first + v) * im.plane + row * p.out_w * V;
      sums[v] += finish2(lines, d, p.out_w, packed_scale(packed + at.norm2, p.hidden, first + v));
    }
  }
  C* out = image + im.sums + band * round_up<C>(p.hidden) + first * V;
  for (int v = 0; v < vectors; ++v) store(out + v * V, sums[v]);
}

// --- gate -------------------------------------------------------------------------------------------------------------

// Whether the gate scales d, once; else it scales the projection's weight, which is smaller.
inline bool scales_map(const MbconvParams& p) { return p.squeezed && p.out_h * p.out_w < p.out_c; }

template <class C>
void gate(const MbconvParams& p, C* image, C* scratch) {
  constexpr int V = kLanes<C>;
  if (!p.squeezed) return;
  const Image<C> im(p);
  const int64_t hidden = round_up<C>(p.hidden), pixels = p.out_h * p.out_w;
  C *means = image + im.sums, *gates = image + im.gates;
  for (int64_t c = 0; c < hidden; c += V) {
    Vec<C> sum = load(means + c);
    for (int64_t band = 1; band < p.bands; ++band) sum += load(means + band * hidden + c);
    store(means + c, sum / static_cast<C>(pixels));
  }
  gate_images<C>(static_cast<const C*>(p.packed) + Packed<C>(p).gate, p.hidden, p.squeezed, p.squeeze_act, p.gate, means,
                 1, gates, scratch);
  if (!scales_map(p)) return;
  for (int64_t c = 0; c < p.hidden; c += V) {
    const Vec<C> g = load_n(gates + c, static_cast<int>(min64(p.hidden - c, V)));
    C* d = image + c / V * im.plane;
    for (int64_t i = 0; i < pixels * V; i += V) store(d + i, load(d + i) * g);
  }
}

// --- projection -------------------------------------------------------------------------------------------------------
//
// A unit is one image, a panel of output channels and a range of pixels, which are taken in blocks.

constexpr int64_t kBlockPixels = 64;

template <class T>
void project(const MbconvParams& p, int64_t n, int64_t i, int64_t split, const compute_t<T>* image,
             compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const Image<C> im(p);
  const Panels<C> panels(p.out_c);
  const int vectors = panels.vectors(i);
  const C* w = static_cast<const C*>(p.packed) + Packed<C>(p).project + panels.offset(i, p.hidden);
  const Ahead<C> next{w + p.hidden * vectors * V, p.hidden * vectors * V};
  C *raw = scratch, *scaled = raw + kBlockPixels * kPanelVectors * V;
  if (p.squeezed && !scales_map(p)) {
    for (int64_t k = 0; k < p.hidden; ++k) {
      const Vec<C> g = broadcast(image[im.gates + k]);
      for (int v = 0; v < vectors; ++v) store(scaled + (k * vectors + v) * V, load(w + (k * vectors + v) * V) * g);
    }
    w = scaled;
  }
  const C* norm = static_cast<const C*>(p.packed) + Packed<C>(p).norm3;
  const Output y{p.y, p.out_c, p.out_h, p.out_w, p.channels_last, p.residual ? &p.x : nullptr};
  const int64_t end = min64((split + 1) * p.split_pixels, p.out_h * p.out_w);
  for (int64_t pixel = split * p.split_pixels; pixel < end; pixel += kBlockPixels) {
    const int64_t count = min64(end - pixel, kBlockPixels);
    multiply<C>({image + pixel * V, V, 1, p.hidden, V, im.plane}, count, w, vectors, raw, V, kBlockPixels * V,
                next);
    for (int v = 0; v < vectors; ++v) {
      C* block = raw + v * kBlockPixels * V;
      finish<C, kIdentity>(block, block, count, packed_scale(norm, p.out_c, panels.begin(i) + v));
      store_pixels<T>(y, n, pixel, count, panels.begin(i) + v, block);
    }
  }
}

// --- plan, pack, run --------------------------------------------------------------------------------------------------

template <class T>
void plan(MbconvParams& p, int64_t threads) {
  using C = compute_t<T>;
  const int64_t halo = ceil_div(p.kernel_size - p.stride, p.stride), pixels = p.out_h * p.out_w;
  const int64_t bands = best_split(p.x.n * Panels<C>(p.hidden).count, p.out_h, halo, p.kernel_size, threads);
  p.band_rows = ceil_div(p.out_h, bands);
  p.bands = ceil_div(p.out_h, p.band_rows);
  const int64_t rescaling = p.squeezed && !scales_map(p) ? kLanes<C> : 0;
  const int64_t splits = best_split(p.x.n * Panels<C>(p.out_c).count, pixels, rescaling, kBlockPixels, threads);
  p.split_pixels = round_up<C>(ceil_div(pixels, splits));  // whole vectors of pixels, for NCHW
  p.splits = ceil_div(pixels, p.split_pixels);
  p.image_size = Image<C>(p).size;
  const int64_t project = kBlockPixels * kPanelVectors * kLanes<C> + (rescaling ? p.hidden * kPanelVectors * kLanes<C> : 0);
  p.scratch_size = max64(max64(Ring<C>(p, needs_staging<T>(p)).size, project), gate_scratch_size<C>(p.hidden, p.squeezed));
}

template <class T>
void pack(const MbconvParams& p, const MbconvWeights& w, compute_t<T>* packed) {
  using C = compute_t<T>;
  const Packed<C> at(p);
  if (p.has_expand) {
    pack_weight(static_cast<const T*>(w.expand), p.hidden, p.x.c, packed + at.expand);
    pack_norm(w.expand_norm, p.hidden, packed + at.norm1);
  }
  pack_taps(static_cast<const T*>(w.depthwise), p.hidden, p.kernel_size * p.kernel_size, packed + at.depthwise);
  pack_norm(w.depthwise_norm, p.hidden, packed + at.norm2);
  if (p.squeezed)
    with_storage(w.gate_dtype, [&](auto storage) {
      using G = decltype(storage);
      if constexpr (std::is_same_v<compute_t<G>, C>) pack_gate<G>(w.gate, p.hidden, p.squeezed, packed + at.gate);
    });
  pack_weight(static_cast<const T*>(w.project), p.out_c, p.hidden, packed + at.project);
  pack_norm(w.project_norm, p.out_c, packed + at.norm3);
}

template <class T>
void run(const MbconvParams& p, MbconvPhase phase, int64_t first, int64_t last, compute_t<T>* images,
         compute_t<T>* scratch) {
  using C = compute_t<T>;
  const int64_t chunks = Panels<C>(p.hidden).count, panels = Panels<C>(p.out_c).count;
  for (int64_t unit = first; unit < last; ++unit) {
    if (phase == MbconvPhase::kWhole) {
      for (int64_t i = 0; i < chunks * p.bands; ++i) expand_depthwise<T>(p, unit, i / p.bands, i % p.bands, images, scratch);
      gate(p, images, scratch);
      for (int64_t i = 0; i < panels * p.splits; ++i) project<T>(p, unit, i / p.splits, i % p.splits, images, scratch);
    } else if (phase == MbconvPhase::kDepthwise) {
      const int64_t n = unit / p.bands / chunks;
      expand_depthwise<T>(p, n, unit / p.bands % chunks, unit % p.bands, images + n * p.image_size, scratch);
    } else if (phase == MbconvPhase::kGate) {
      gate(p, images + unit * p.image_size, scratch);
    } else {
      const int64_t n = unit / p.splits / panels;
      project<T>(p, n, unit / p.splits % panels, unit % p.splits, images + n * p.image_size, scratch);
    }
  }
}

}  // namespace

namespace EFFK_ISA {

int64_t mbconv_packed_size(const MbconvParams& p) {
  return p.dtype == Dtype::kFloat64 ? Packed<double>(p).size : Packed<float>(p).size;
}

void mbconv_plan(MbconvParams& p, int64_t threads) {
  with_storage(p.dtype, [&](auto storage) { plan<decltype(storage)>(p, threads); });
}

void mbconv_pack(const MbconvParams& p, const MbconvWeights& weights, void* packed) {
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    pack<T>(p, weights, static_cast<compute_t<T>*>(packed));
  });
}

int64_t mbconv_units(const MbconvParams& p, MbconvPhase phase) {
  const bool wide = p.dtype == Dtype::kFloat64;
  auto panels = [&](int64_t c) { return wide ? Panels<double>(c).count : Panels<float>(c).count; };
  switch (phase) {
    case MbconvPhase::kDepthwise: return p.x.n * panels(p.hidden) * p.bands;
    case MbconvPhase::kProject: return p.x.n * panels(p.out_c) * p.splits;
    default: return p.x.n;
  }
}

void mbconv_run(const MbconvParams& p, MbconvPhase phase, int64_t first, int64_t last, void* images, void* scratch) {
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    using C = compute_t<T>;
    run<T>(p, phase, first, last, static_cast<C*>(images), static_cast<C*>(scratch));
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
