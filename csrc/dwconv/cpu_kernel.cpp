#include "cpu_kernel.h"

#include "depthwise.h"
#include "expand_rows.h"
#include "matmul.h"

namespace effk {
namespace {

// One image's `channels` from c on and output `rows` from row on; their sums are the partial of that number.
struct Unit {
  int64_t n, c, channels, row, rows, partial;
};

inline Unit unit_at(const DwconvParams& p, int64_t index) {
  const int64_t band = index % p.bands, chunk = index / p.bands % p.chunks, n = index / p.bands / p.chunks;
  const int64_t c = chunk * p.chunk_channels, row = band * p.band_rows;
  return {n, c, min64(p.chunk_channels, p.x.c - c), row, min64(p.band_rows, p.out_h - row), n * p.bands + band};
}

constexpr int64_t kLineBytes = 64;

// Of a raw output vector, what statistics are taken about.
template <class T>
Vec<compute_t<T>> first_value(const DwconvParams& p, const compute_t<T>* raw, const Scale<compute_t<T>>& scale) {
  using C = compute_t<T>;
  Vec<C> z{};
  with_activation(p.epilogue.activation, [&](auto act) { z = activate<act>(scale(load(raw))); });
  return origin_of<C>(p.reduce, rounded<T>(z));
}

// --- channels_last: lanes are channels --------------------------------------------------------------------------------
//
// The rows that the current output row needs stand in a ring of k rows in scratch, converted, normalised, activated and
// padded with zero columns: [vectors][k][padded_w][lanes]. So each input element is activated once and no tap has a
// bounds check. The map is read and written a whole row of all the chunk's channels at a time: one vector of channels
// after the other would leave most of each page for later.

inline int64_t padded_width(const DwconvParams& p) { return padded_width(p.out_w, p.kernel_size, p.stride); }

// The scratch of a unit, in elements.
template <class C>
struct Layout {
  static constexpr int64_t V = kLanes<C>;
  int64_t tiles, row, ring, line;  // of one vector
  int64_t lines, sums, size;       // where they begin, after the rings; the whole

  Layout(const DwconvParams& p, int64_t vectors)
      : tiles(ceil_div(p.out_w, tile_of(p.out_w))), row(padded_width(p) * V),
        ring(odd_lines(p.kernel_size * padded_width(p)) * V),
        line(odd_lines(width_in_tiles(p.out_w)) * V), lines(vectors * ring), sums(lines + vectors * line),
        size(sums + vectors * static_cast<int64_t>((sizeof(Sums<C>) + 2 * sizeof(Scale<C>)) / sizeof(C))) {}
};

// The padding of the rings, which units leave zero.
template <class C>
void clear_rings(const Layout<C>& size, C* scratch) {
  for (int64_t i = 0; i < size.lines; i += kLanes<C>) store(scratch + i, Vec<C>{});
}

// One unit's channels of a map's rows, and of its output from the unit's first row on; strides are in elements.
template <class Out>
struct View {
  int64_t stride_c, stride_w;
  int64_t ahead;  // from a row to the next one, which is fetched meanwhile
  Out* y;
  int64_t y_pixel;   // from one pixel to the next; channels are next to each other
  int64_t channels;  // in memory, at least the unit's
};

// row_of_x(i) is row i of the map.
template <class In, class Out, class RowOfX>
void run_channels_last(const DwconvParams& p, const Unit& u, const View<Out>& view, RowOfX row_of_x,
                       ConvRow<compute_t<In>> conv, const Layout<compute_t<In>>& size, compute_t<In>* scratch) {
  using C = compute_t<In>;
  constexpr int V = kLanes<C>;
  const int k = p.kernel_size;
  const int64_t chunk_vectors = p.chunk_channels / V, vectors = ceil_div(view.channels, V), width = size.row / V;
  const int64_t left = min64(p.pad_left, width), columns = min64(p.x.w, width - left);
  const int last_lanes = static_cast<int>((view.channels - 1) % V + 1);
  C* rings = scratch;               // [vectors][k][width][lanes]
  C* lines = scratch + size.lines;  // [vectors][width_in_tiles][lanes]: one output row before the epilogue
  Sums<C>* sums = reinterpret_cast<Sums<C>*>(scratch + size.sums);
  Scale<C>* prologue = reinterpret_cast<Scale<C>*>(sums + chunk_vectors);
  Scale<C>* epilogue = prologue + chunk_vectors;
  const Transform<In, C> transform_in = transform_for<In, C>(p.prologue.activation, false);
  const Transform<C, Out> transform_out = transform_for<C, Out>(p.epilogue.activation, p.reduce != Reduce::kNone);
  // A row of pixels, each of `vectors`; one whole vector a pixel makes a single row of vectors.
  auto pixels = [&](auto block, int64_t in_pixel, int64_t out_pixel, int64_t count) {
    if (vectors == 1 && last_lanes == V) {
      block.rows = 1, block.vectors = count, block.in_vector = in_pixel, block.out_vector = out_pixel;
    } else {
      block.rows = count, block.vectors = vectors, block.in_row = in_pixel, block.out_row = out_pixel;
      block.scale_step = 1;
    }
    block.last_lanes = last_lanes;
    return block;
  };

  for (int64_t v = 0; v < vectors; ++v) {
    const int lanes = static_cast<int>(min64(u.channels - v * V, V));
    prologue[v] = Scale<C>::lanes(p.prologue, u.c + v * V, lanes);
    epilogue[v] = Scale<C>::lanes(p.epilogue, u.c + v * V, lanes);
    sums[v] = Sums<C>{};
  }

  int64_t staged = max64(u.row * p.stride - p.pad_top, 0);
  for (int64_t row = u.row; row < u.row + u.rows; ++row) {
    const int64_t top = row * p.stride - p.pad_top;
    const int ky_begin = static_cast<int>(min64(max64(-top, 0), k));
    const int ky_end = static_cast<int>(max64(min64(p.x.h - top, k), ky_begin));
    for (int64_t in = max64(staged, top); in < top + ky_end; ++in) {
      auto block = pixels(Block<In, C>{row_of_x(in), 0, V * view.stride_c, view.stride_c,
                                       rings + in % k * size.row + left * V, 0, size.ring},
                          view.stride_w, V, columns);
      block.ahead = p.stride * view.ahead;  // the row that takes its place: its loads would wait for memory
      transform_in(block, prologue, nullptr);
    }
    staged = max64(staged, top + ky_end);
    int64_t offset[kMaxKernelSize];
    for (int ky = ky_begin; ky < ky_end; ++ky) offset[ky] = (top + ky) % k * size.row;
    for (int64_t v = 0; v < vectors; ++v) {
      const C* window[kMaxKernelSize];
      for (int ky = ky_begin; ky < ky_end; ++ky) window[ky] = rings + v * size.ring + offset[ky];
      const C* weights = static_cast<const C*>(p.packed) + (u.c + v * V) * k * k;
      conv(window, ky_begin, ky_end, weights, size.tiles, lines + v * size.line);
      if (row == u.row && p.reduce == Reduce::kStatistics)
        sums[v].origin = first_value<Out>(p, lines + v * size.line, epilogue[v]);
    }
    Out* y = view.y + (row - u.row) * p.out_w * view.y_pixel;
    transform_out(pixels(Block<C, Out>{lines, 0, size.line, 1, y, 0, V}, V, view.y_pixel, p.out_w), epilogue, sums);
  }
  if (p.reduce == Reduce::kNone) return;
  for (int64_t c = 0; c < u.channels; ++c) {
    const Sums<C>& s = sums[c / V];
    write_partial(p.partials, p.reduce, p.x.c, u.partial, u.c + c, s.origin[c % V], s.sum[c % V], s.square[c % V],
                  static_cast<double>(u.rows * p.out_w));
  }
}

// --- NCHW, small maps: transposed on the way in and out ---------------------------------------------------------------
//
// Lanes of columns would be half empty, or cost a row's overhead for a vector's work. A unit is kLanes channels.

constexpr int64_t kSmallMap = 1024;  // pixels

inline bool is_transposed(const DwconvParams& p) {
  const bool dense = p.x.stride_w == 1 && (p.x.stride_h == p.x.w || p.x.h == 1);
  return dense && max64(p.x.h * p.x.w, p.out_h * p.out_w) <= kSmallMap;
}

template <class T>
void run_transposed(const DwconvParams& p, const Unit& u, ConvRow<compute_t<T>> conv, const Layout<compute_t<T>>& size,
                    compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int64_t pixels = p.x.h * p.x.w, out_pixels = p.out_h * p.out_w;
  C* in = scratch + size.size;                       // [pixels][lanes]
  T* out = reinterpret_cast<T*>(in + round_up<C>(pixels) * V);  // [out_pixels][lanes]
  Vec<C> rows[V] = {};
  const T* x = row_of<T>(p.x, u.n, u.c, 0);
  T* y = static_cast<T*>(p.y) + (u.n * p.x.c + u.c) * out_pixels;
  for (int64_t i = 0; i < pixels; i += V) {
    // Hardware does not follow so many streams: the next unit's input and this one's output are fetched ahead.
    for (int64_t c = 0; c < V; ++c) {
      __builtin_prefetch(x + (V + c) * p.x.stride_c + i);
      if (i < out_pixels) __builtin_prefetch(y + c * out_pixels + i, 1);
      rows[c] = c < u.channels ? load_n(x + c * p.x.stride_c + i, static_cast<int>(min64(pixels - i, V))) : Vec<C>{};
    }
    transpose<C>(rows);
    for (int64_t j = 0; j < V; ++j) store(in + (i + j) * V, rows[j]);
  }
  const auto row = [&](int64_t i) { return in + i * p.x.w * V; };
  run_channels_last<C, T>(p, u, View<T>{1, V, 0, out, V, V}, row, conv, size, scratch);
  for (int64_t i = 0; i < out_pixels; i += V) {
    for (int64_t j = 0; j < V; ++j) rows[j] = load(out + (i + j) * V);
    transpose<C>(rows);
    for (int64_t c = 0; c < u.channels; ++c)
      store_n(y + c * out_pixels + i, rows[c], static_cast<int>(min64(out_pixels - i, V)));
  }
}

// --- NCHW, large maps: lanes are columns ------------------------------------------------------------------------------
//
// A unit is a band of one plane. Its rows are staged in scratch, converted, normalised, activated and padded, the even
// and the odd columns apart for stride 2: [rows][stride][length]. Then kRowBlock output rows are accumulated at once, so
// that a loaded vector serves up to k of them.

constexpr int kRowBlock = 7;

// Of a staged row of one phase.
template <class C>
int64_t staged_length(const DwconvParams& p) {
  const int64_t read = round_up<C>(p.out_w) + p.kernel_size, written = ceil_div(p.pad_left + p.x.w, p.stride);
  return round_up<C>(max64(read, written));
}

// kRowBlock output rows, [kRowBlock][vectors][lanes]. `staged` begins at the first input row of the block; its rows
// [begin, end) lie inside the map. `weights` are [k * k][lanes].
template <class C>
using ConvRows = void (*)(const C* staged, int64_t length, int64_t begin, int64_t end, const C* weights,
                          int64_t vectors, C* out);

template <class C, int K, int S>
void conv_rows(const C* staged, int64_t length, int64_t begin, int64_t end, const C* weights, int64_t vectors, C* out) {
  constexpr int V = kLanes<C>, R = kRowBlock;
  for (int64_t j = 0; j < vectors; ++j) {
    Vec<C> acc[R] = {};
#pragma GCC unroll 32
    for (int row = 0; row < (R - 1) * S + K; ++row) {
      if (row < begin || row >= end) continue;
      const C* in = staged + row * S * length + j * V;
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) {
        const Vec<C> v = in_register(load(in + kx % S * length + kx / S));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          if (row >= r * S && row - r * S < K) acc[r] += v * load(weights + ((row - r * S) * K + kx) * V);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(out + (r * vectors + j) * V, acc[r]);
  }
}

template <class T>
void run_plane(const DwconvParams& p, const Unit& u, ConvRows<compute_t<T>> conv, compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>, R = kRowBlock;
  const int64_t s = p.stride, taps = p.kernel_size * p.kernel_size, length = staged_length<C>(p);
  const int64_t vectors = ceil_div(p.out_w, V), blocks = ceil_div(u.rows, R);
  const int64_t in_rows = (blocks * R - 1) * s + p.kernel_size, top = u.row * s - p.pad_top, in_row = s * length;
  C* weights = scratch;                 // [taps][lanes], the same in each lane
  C* staged = weights + taps * V;       // [in_rows][stride][length]
  C* wide = staged + in_rows * in_row;  // [stride * length]: a row before its even and odd columns are parted
  C* raw = wide + in_row;               // [blocks * R][vectors][lanes]

  for (int64_t t = 0; t < taps; ++t)
    store(weights + t * V, broadcast(static_cast<const C*>(p.packed)[u.c * taps + t]));

  const int64_t first = max64(-top, 0), last = max64(min64(p.x.h - top, in_rows), first);
  const Transform<T, C> stage = transform_for<T, C>(p.prologue.activation, false);
  const Scale<C> prologue = Scale<C>::one(p.prologue, u.c), epilogue = Scale<C>::one(p.epilogue, u.c);
  auto stage_rows = [&](int64_t row, int64_t rows, C* out) {
    for (int64_t i = 0; i < rows * in_row; i += V) store(out + i, Vec<C>{});
    stage({row_of<T>(p.x, u.n, u.c, top + row), p.x.stride_h, V * p.x.stride_w, p.x.stride_w, out + p.pad_left, in_row,
           V, rows, ceil_div(p.x.w, V), static_cast<int>((p.x.w - 1) % V + 1), 0},
          &prologue, nullptr);
  };
  if (s == 1) {
    stage_rows(first, last - first, staged + first * in_row);
  } else {
    for (int64_t row = first; row < last; ++row) {
      stage_rows(row, 1, wide);
      C *even = staged + row * in_row, *odd = even + length;
      for (int64_t i = 0; i < length; ++i) {
        even[i] = wide[2 * i];
        odd[i] = wide[2 * i + 1];
      }
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t offset = b * R * s;
    // What the next unit will stage.
    const T* next = row_of<T>(p.x, u.n, u.c, top + last);
    for (int64_t i = u.rows * s * b / blocks; i < u.rows * s * (b + 1) / blocks; ++i)
      for (int64_t j = 0; j < p.x.w; j += kLineBytes / sizeof(T)) __builtin_prefetch(next + i * p.x.stride_h + j, 0, 2);
    conv(staged + offset * in_row, length, first - offset, last - offset, weights, vectors, raw + b * R * vectors * V);
  }
  Sums<C> sums;
  if (p.reduce == Reduce::kStatistics) sums.origin = broadcast(first_value<T>(p, raw, epilogue)[0]);
  T* y = static_cast<T*>(p.y) + ((u.n * p.x.c + u.c) * p.out_h + u.row) * p.out_w;
  const Transform<C, T> finish = transform_for<C, T>(p.epilogue.activation, p.reduce != Reduce::kNone);
  finish({raw, vectors * V, V, 1, y, p.out_w, V, u.rows, vectors, static_cast<int>((p.out_w - 1) % V + 1), 0}, &epilogue,
         &sums);
  if (p.reduce == Reduce::kNone) return;
  double sum = 0, square = 0;
  for (int i = 0; i < V; ++i) {
    sum += sums.sum[i];
    square += sums.square[i];
  }
  write_partial(p.partials, p.reduce, p.x.c, u.partial, u.c, sums.origin[0], sum, square,
                static_cast<double>(u.rows * p.out_w));
}

// --- dispatch ---------------------------------------------------------------------------------------------------------

constexpr int64_t kL1Bytes = 32 << 10;
constexpr int64_t kL2Bytes = 256 << 10;
constexpr int64_t kMinUnits = 32;  // enough for many cores to share evenly

inline bool lanes_are_channels(const DwconvParams& p) { return p.channels_last || is_transposed(p); }

template <class T>
void plan(DwconvParams& p) {
  using C = compute_t<T>;
  constexpr int64_t V = kLanes<C>, size = sizeof(C);
  const int64_t k = p.kernel_size, s = p.stride, vectors = ceil_div(p.x.c, V), per_vector = Layout<C>(p, 1).size;
  if (p.channels_last) {
    const int64_t fitting = max64(min64(kL2Bytes / size / per_vector, vectors), 1);
    const int64_t per_chunk = ceil_div(vectors, ceil_div(vectors, fitting));
    p.chunk_channels = per_chunk * V;
    const int64_t wanted = ceil_div(kMinUnits, max64(p.x.n * ceil_div(vectors, per_chunk), 1));
    p.band_rows = max64(ceil_div(p.out_h, wanted), min64(p.out_h, 4 * k));
    p.scratch_size = per_chunk * per_vector + ExpandedRows<T>::scratch_size(p.expand, p.chunk_channels);
  } else if (is_transposed(p)) {
    p.chunk_channels = V;
    p.band_rows = p.out_h;
    p.scratch_size = (round_up<C>(p.x.h * p.x.w) + round_up<C>(p.out_h * p.out_w)) * V + per_vector;
  } else {
    p.chunk_channels = 1;
    const int64_t length = staged_length<C>(p), out_row = round_up<C>(p.out_w);
    const int64_t rows = max64(kL1Bytes / size / (s * s * length + out_row) / kRowBlock, 1) * kRowBlock;
    p.band_rows = ceil_div(p.out_h, ceil_div(p.out_h, rows));
    const int64_t blocks = ceil_div(p.band_rows, kRowBlock), in_rows = (blocks * kRowBlock - 1) * s + k;
    p.scratch_size = k * k * V + (in_rows + 1) * s * length + blocks * kRowBlock * out_row;
  }
  p.chunks = ceil_div(p.x.c, p.chunk_channels);
  p.bands = ceil_div(p.out_h, p.band_rows);
  p.units = p.x.n * p.chunks * p.bands;
  p.packed_size = (lanes_are_channels(p) ? vectors * V : p.x.c) * k * k;
  p.packed_size += packed_expansion_size<T>(p.expand, p.chunks, p.chunk_channels);
}

template <class T>
void pack(const DwconvParams& p) {
  using C = compute_t<T>;
  constexpr int64_t V = kLanes<C>;
  const T* weight = static_cast<const T*>(p.weight);
  C* packed = static_cast<C*>(p.packed);
  const int64_t taps = p.kernel_size * p.kernel_size;
  if (lanes_are_channels(p)) {
    pack_taps(weight, p.x.c, taps, packed);
    pack_expansion<T>(p.expand, p.x.c, p.chunk_channels, packed + round_up<C>(p.x.c) * taps);
  } else {
    for (int64_t i = 0; i < p.x.c * taps; i += V) {
      const int n = static_cast<int>(min64(p.x.c * taps - i, V));
      store_n(packed + i, load_n(weight + i, n), n);
    }
  }
}

template <class T, int K, int S>
void run(const DwconvParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  using C = compute_t<T>;
  const ConvRow<C> row = conv_row_of<C, K, S>(p.out_w);
  C* buffer = static_cast<C*>(scratch);
  const Layout<C> size(p, p.chunk_channels / kLanes<C>);
  if (lanes_are_channels(p)) clear_rings(size, buffer);
  for (int64_t i = first_unit; i < last_unit; ++i) {
    const Unit u = unit_at(p, i);
    if (p.channels_last) {
      T* y = static_cast<T*>(p.y) + (u.n * p.out_h + u.row) * p.out_w * p.x.c + u.c;
      if (p.expand.x.data) {
        const C* packed = static_cast<const C*>(p.packed) + round_up<C>(p.x.c) * K * K;
        ExpandedRows<T> rows(p.expand, packed, u.c / p.chunk_channels, p.chunk_channels, u.channels,
                             buffer + size.size);
        const int64_t end = min64((u.row + u.rows - 1) * S - p.pad_top + K, p.x.h);
        run_channels_last<C, T>(p, u, View<T>{1, rows.stride(), 0, y, p.x.c, u.channels},
                                [&](int64_t i) { return rows.row(u.n, i, end); }, row, size, buffer);
      } else {
        run_channels_last<T, T>(p, u, View<T>{p.x.stride_c, p.x.stride_w, p.x.stride_h, y, p.x.c, u.channels},
                                [&](int64_t i) { return row_of<T>(p.x, u.n, u.c, i); }, row, size, buffer);
      }
    } else if (is_transposed(p)) {
      run_transposed<T>(p, u, row, size, buffer);
    } else {
      run_plane<T>(p, u, &conv_rows<C, K, S>, buffer);
    }
  }
}

}  // namespace

namespace EFFK_ISA {

void dwconv_plan(DwconvParams& p) {
  with_product_storage(p.dtype, [&](auto storage) { plan<decltype(storage)>(p); });
}

void dwconv_pack(const DwconvParams& p) {
  with_product_storage(p.dtype, [&](auto storage) { pack<decltype(storage)>(p); });
}

void dwconv_run(const DwconvParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  with_product_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    const bool one = p.stride == 1;
    switch (p.kernel_size) {
      case 3: return (one ? &run<T, 3, 1> : &run<T, 3, 2>)(p, first_unit, last_unit, scratch);
      case 5: return (one ? &run<T, 5, 1> : &run<T, 5, 2>)(p, first_unit, last_unit, scratch);
      case 7: return (one ? &run<T, 7, 1> : &run<T, 7, 2>)(p, first_unit, last_unit, scratch);
    }
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
