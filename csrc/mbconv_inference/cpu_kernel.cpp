#include "cpu_kernel.h"

#include "../squeeze_excite/gate.h"
#include "depthwise.h"
#include "matmul.h"
#include "pixels.h"
#include "tile.h"

namespace effk {
namespace {

// --- where things lie -------------------------------------------------------------------------------------------------

// The packed weights, in elements; scales and shifts are padded to whole vectors.
template <class T>
struct Packed {
  using C = compute_t<T>;
  int64_t expand, norm1, depthwise, norm2, gate, project, norm3, size;

  explicit Packed(const MbconvParams& p) {
    const int64_t hidden = round_up<C>(p.hidden), taps = p.kernel_size * p.kernel_size;
    expand = 0;
    norm1 = expand + (p.has_expand ? packed_size<Product<T>>(p.hidden, p.x.c) : 0);
    depthwise = norm1 + (p.has_expand ? 2 * hidden : 0);
    norm2 = depthwise + hidden * taps;
    gate = norm2 + 2 * hidden;
    project = gate + (p.squeezed ? GateLayout<C>(p.hidden, p.squeezed).size : 0);
    norm3 = project + packed_size<Product<T>>(p.out_c, p.hidden);
    size = norm3 + 2 * round_up<C>(p.out_c);
  }
};

// Whether x must be converted, or its rows joined, before it can be multiplied.
template <class T>
bool needs_staging(const MbconvParams& p) {
  const bool joined = p.x.w >= kGroupPixels || p.x.h == 1 || p.x.stride_h == p.x.w * p.x.stride_w;
  return p.has_expand && !(Product<T>::takes(p.x) && joined);
}

// What the phases hand on for one image, in elements: d as planes of one vector of channels, [vectors][pixels][lanes],
// its sums over each band [bands][channels], the gates [channels], and x as a left operand if it needs staging.
template <class T>
struct Image {
  using C = compute_t<T>;
  int64_t plane, sums, gates, staged, staged_row, size;

  explicit Image(const MbconvParams& p) {
    const int64_t hidden = round_up<C>(p.hidden);
    plane = odd_lines(p.out_h * p.out_w) * kLanes<C>;
    sums = hidden / kLanes<C> * plane;
    gates = sums + p.bands * hidden;
    staged = gates + hidden;
    staged_row = Product<T>::kOwnOperands ? Product<T>::row(p.x.c) : round_up<C>(p.x.c);
    size = staged + (needs_staging<T>(p) ? (p.x.h * p.x.w + Product<T>::kSlack) * staged_row : 0);
  }
};

// --- stage ------------------------------------------------------------------------------------------------------------

constexpr int64_t kStagePixels = 256;  // of a unit

inline int64_t stage_units(const MbconvParams& p) { return ceil_div(p.x.h * p.x.w, kStagePixels); }

template <class T>
void stage(const MbconvParams& p, int64_t n, int64_t unit, compute_t<T>* image, compute_t<T>* scratch) {
  using C = compute_t<T>;
  const Image<T> im(p);
  const int64_t end = min64((unit + 1) * kStagePixels, p.x.h * p.x.w);
  for (int64_t pixel = unit * kStagePixels; pixel < end; pixel += kGroupPixels) {
    const int64_t count = min64(end - pixel, kGroupPixels);
    C* out = image + im.staged + pixel * im.staged_row;
    if constexpr (Product<T>::kOwnOperands) {
      const Tile<C> x = load_tile<T>(p.x, n, pixel, count, 0, p.x.c, scratch);
      Product<T>::left({x.data, x.stride, 1, p.x.c}, count, nullptr, out);
    } else {
      load_tile<T>(p.x, n, pixel, count, 0, p.x.c, out, im.staged_row);
    }
  }
}

// `rows` rows of x as the left operand of a product.
template <class T>
Rows<compute_t<T>> input_rows(const MbconvParams& p, int64_t n, int64_t row, const compute_t<T>* image) {
  if (!needs_staging<T>(p))
    return Product<T>::in_place(row_of<T>(p.x, n, 0, row), p.x.stride_w, p.x.stride_c, p.x.c);
  const Image<T> im(p);
  return {image + im.staged + row * p.x.w * im.staged_row, im.staged_row, 1, Product<T>::row(p.x.c)};
}

// --- expand and depthwise ---------------------------------------------------------------------------------------------
//
// A unit is one image, a panel of expanded channels and a band of output rows. The rows of e that the current output row
// needs stand in a ring in scratch, activated and padded with zero columns: [vectors][slots][width][lanes]. So e never
// reaches memory, no pixel of it is computed twice within a band, and no tap has a bounds check.

template <class C>
struct Ring {
  int64_t rows;                     // of the map, expanded at once
  int64_t slots, width, left, columns;
  int64_t ring;                     // of one vector of channels
  int64_t line;                     // of one vector: `rows` raw rows of e, or one of d
  int64_t size;

  explicit Ring(const MbconvParams& p) {
    rows = p.has_expand ? min64(ceil_div(kGroupPixels, p.x.w), p.x.h) : 1;
    slots = p.kernel_size + rows - 1;
    width = padded_width(p.out_w, p.kernel_size, p.stride);
    left = min64(p.pad_left, width);
    columns = min64(p.x.w, width - left);
    ring = odd_lines(slots * width) * kLanes<C>;
    line = odd_lines(max64(rows * p.x.w, width_in_tiles(p.out_w))) * kLanes<C>;
    size = kPanelVectors * (ring + line);
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

template <class T>
void expand_depthwise(const MbconvParams& p, int64_t n, int64_t chunk, int64_t band, compute_t<T>* image,
                      compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const Packed<T> at(p);
  const Image<T> im(p);
  const Panels<C> panels(p.hidden);
  const Ring<C> r(p);
  const Product<T> product(r.rows * p.x.w);
  const C* packed = static_cast<const C*>(p.packed);
  const int vectors = panels.vectors(chunk), k = p.kernel_size;
  const int64_t first = panels.begin(chunk), taps = k * k;
  const Finish<C> finish1 = finish_for<T>(p.act1), finish2 = finish_for<T>(p.act2);
  const ConvRow<C> conv = conv_row_for<C>(p);
  C *rings = scratch, *lines = rings + kPanelVectors * r.ring;
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
        product.store(input_rows<T>(p, n, staged, image), rows * p.x.w,
                      packed + at.expand + first * Product<T>::column_vector(p.x.c), vectors, lines, V, r.line);
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

template <class T>
void gate(const MbconvParams& p, compute_t<T>* image, compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  if (!p.squeezed) return;
  const Image<T> im(p);
  const int64_t hidden = round_up<C>(p.hidden), pixels = p.out_h * p.out_w;
  C *means = image + im.sums, *gates = image + im.gates;
  for (int64_t c = 0; c < hidden; c += V) {
    Vec<C> sum = load(means + c);
    for (int64_t band = 1; band < p.bands; ++band) sum += load(means + band * hidden + c);
    store(means + c, sum / static_cast<C>(pixels));
  }
  gate_images<C>(static_cast<const C*>(p.packed) + Packed<T>(p).gate, p.hidden, p.squeezed, p.squeeze_act, p.gate, means,
                 1, gates, scratch);
}

// --- projection -------------------------------------------------------------------------------------------------------
//
// A unit is one image, a share of the panels of output channels and a range of pixels, which are taken in blocks.

constexpr int64_t kBlockPixels = 64;

template <class T>
void project(const MbconvParams& p, int64_t n, int64_t share, int64_t split, const compute_t<T>* image,
             compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const Image<T> im(p);
  const Panels<C> panels(p.out_c);
  const C* weight = static_cast<const C*>(p.packed) + Packed<T>(p).project;
  const C* norm = static_cast<const C*>(p.packed) + Packed<T>(p).norm3;
  const C* gates = p.squeezed ? image + im.gates : nullptr;
  C *raw = scratch, *buffer = raw + kBlockPixels * kPanelVectors * V;
  const Output y{p.y, p.out_c, p.out_h, p.out_w, p.channels_last, p.residual ? &p.x : nullptr};
  const int64_t begin = split * p.split_pixels, end = min64(begin + p.split_pixels, p.out_h * p.out_w);
  const Product<T> product(min64(end - begin, kBlockPixels));
  for (int64_t pixel = begin; pixel < end; pixel += kBlockPixels) {
    const int64_t count = min64(end - pixel, kBlockPixels);
    const Rows<C> left = Product<T>::left({image + pixel * V, V, 1, p.hidden, V, im.plane}, count, gates, buffer);
    for (int64_t i = share * panels.count / p.shares; i < (share + 1) * panels.count / p.shares; ++i) {
      const int vectors = panels.vectors(i);
      product.store(left, count, weight + panels.begin(i) * Product<T>::column_vector(p.hidden), vectors, raw, V,
                    kBlockPixels * V);
      for (int v = 0; v < vectors; ++v) {
        C* block = raw + v * kBlockPixels * V;
        finish<T, kIdentity>(block, block, count, packed_scale(norm, p.out_c, panels.begin(i) + v));
        store_pixels<T>(y, n, pixel, count, panels.begin(i) + v, block);
      }
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
  const int64_t splits = best_split(p.x.n, pixels, 0, kBlockPixels, threads);
  p.split_pixels = ceil_div(pixels, splits);
  if (!p.channels_last) p.split_pixels = round_up<C>(p.split_pixels);  // whole vectors of pixels
  p.splits = ceil_div(pixels, p.split_pixels);
  p.shares = best_split(p.x.n * p.splits, Panels<C>(p.out_c).count, 0, 1, threads);
  p.image_size = Image<T>(p).size;
  const int64_t staging = kGroupPixels * round_up<C>(p.x.c);
  const int64_t project =
      kBlockPixels * kPanelVectors * kLanes<C> + Product<T>::left_size(kBlockPixels, p.hidden, p.squeezed > 0);
  p.scratch_size = max64(max64(staging, Ring<C>(p).size), max64(project, gate_scratch_size<C>(p.hidden, p.squeezed)));
}

// Units of packing: what is small and the gate, then the panels of the expansion, then those of the projection.
template <class T>
int64_t pack_units(const MbconvParams& p) {
  using C = compute_t<T>;
  return 1 + (p.has_expand ? Panels<C>(p.hidden).count : 0) + Panels<C>(p.out_c).count;
}

template <class T>
void pack(const MbconvParams& p, const MbconvWeights& w, compute_t<T>* packed, int64_t first, int64_t last) {
  using C = compute_t<T>;
  const Packed<T> at(p);
  const int64_t expand = 1, project = pack_units<T>(p) - Panels<C>(p.out_c).count;
  if (first == 0) {
    if (p.has_expand) pack_norm(w.expand_norm, p.hidden, packed + at.norm1);
    pack_taps(static_cast<const T*>(w.depthwise), p.hidden, p.kernel_size * p.kernel_size, packed + at.depthwise);
    pack_norm(w.depthwise_norm, p.hidden, packed + at.norm2);
    if (p.squeezed)
      with_storage(w.gate_dtype, [&](auto storage) {
        using G = decltype(storage);
        if constexpr (std::is_same_v<compute_t<G>, C>) pack_gate<G>(w.gate, p.hidden, p.squeezed, packed + at.gate);
      });
    pack_norm(w.project_norm, p.out_c, packed + at.norm3);
  }
  if (p.has_expand)
    pack_weight<Product<T>>(static_cast<const T*>(w.expand), p.hidden, p.x.c, packed + at.expand, first - expand,
                            last - expand);
  pack_weight<Product<T>>(static_cast<const T*>(w.project), p.out_c, p.hidden, packed + at.project, first - project,
                          last - project);
}

template <class T>
void run(const MbconvParams& p, MbconvPhase phase, int64_t first, int64_t last, compute_t<T>* images,
         compute_t<T>* scratch) {
  using C = compute_t<T>;
  const int64_t chunks = Panels<C>(p.hidden).count, stages = needs_staging<T>(p) ? stage_units(p) : 0;
  for (int64_t unit = first; unit < last; ++unit) {
    if (phase == MbconvPhase::kWhole) {
      for (int64_t i = 0; i < stages; ++i) stage<T>(p, unit, i, images, scratch);
      for (int64_t i = 0; i < chunks * p.bands; ++i) expand_depthwise<T>(p, unit, i / p.bands, i % p.bands, images, scratch);
      gate<T>(p, images, scratch);
      for (int64_t i = 0; i < p.shares * p.splits; ++i) project<T>(p, unit, i / p.splits, i % p.splits, images, scratch);
    } else if (phase == MbconvPhase::kStage) {
      const int64_t n = unit / stages;
      stage<T>(p, n, unit % stages, images + n * p.image_size, scratch);
    } else if (phase == MbconvPhase::kDepthwise) {
      const int64_t n = unit / p.bands / chunks;
      expand_depthwise<T>(p, n, unit / p.bands % chunks, unit % p.bands, images + n * p.image_size, scratch);
    } else if (phase == MbconvPhase::kGate) {
      gate<T>(p, images + unit * p.image_size, scratch);
    } else {
      const int64_t n = unit / p.splits / p.shares;
      project<T>(p, n, unit / p.splits % p.shares, unit % p.splits, images + n * p.image_size, scratch);
    }
  }
}

}  // namespace

namespace EFFK_ISA {

int64_t mbconv_packed_size(const MbconvParams& p) {
  int64_t size = 0;
  with_product_storage(p.dtype, [&](auto storage) { size = Packed<decltype(storage)>(p).size; });
  return size;
}

void mbconv_plan(MbconvParams& p, int64_t threads) {
  with_product_storage(p.dtype, [&](auto storage) { plan<decltype(storage)>(p, threads); });
}

int64_t mbconv_pack_units(const MbconvParams& p) {
  int64_t units = 0;
  with_product_storage(p.dtype, [&](auto storage) { units = pack_units<decltype(storage)>(p); });
  return units;
}

void mbconv_pack(const MbconvParams& p, const MbconvWeights& weights, void* packed, int64_t first, int64_t last) {
  with_product_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    pack<T>(p, weights, static_cast<compute_t<T>*>(packed), first, last);
  });
}

int64_t mbconv_units(const MbconvParams& p, MbconvPhase phase) {
  int64_t units = p.x.n;
  with_product_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    if (phase == MbconvPhase::kStage) units *= needs_staging<T>(p) ? stage_units(p) : 0;
    if (phase == MbconvPhase::kGate) units *= p.squeezed > 0;
    if (phase == MbconvPhase::kDepthwise) units *= Panels<compute_t<T>>(p.hidden).count * p.bands;
    if (phase == MbconvPhase::kProject) units *= p.shares * p.splits;
  });
  return units;
}

void mbconv_run(const MbconvParams& p, MbconvPhase phase, int64_t first, int64_t last, void* images, void* scratch) {
  with_product_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    using C = compute_t<T>;
    run<T>(p, phase, first, last, static_cast<C*>(images), static_cast<C*>(scratch));
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
