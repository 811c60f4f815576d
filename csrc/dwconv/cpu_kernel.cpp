#include "cpu_kernel.h"

#include "vec_map.h"

namespace effk {
namespace {

// Rows and columns of the input that an output range needs begin at first * stride - pad.
struct Unit {
  int64_t n, c, channels, row, rows, partial;
};

inline Unit unit_at(const DwconvParams& p, int64_t index) {
  const int64_t band = index % p.bands, chunk = index / p.bands % p.chunks, n = index / p.bands / p.chunks;
  const int64_t c = chunk * p.chunk_channels, row = band * p.band_rows;
  return {n, c, min64(p.chunk_channels, p.x.c - c), row, min64(p.band_rows, p.out_h - row), n * p.bands + band};
}

constexpr int kMaxKernelSize = 7;

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

// The tile of output columns that are accumulated in registers: what covers the row with less waste.
inline int tile_of(int64_t out_w) { return ceil_div(out_w, 7) * 7 <= ceil_div(out_w, 8) * 8 ? 7 : 8; }

inline int64_t width_in_tiles(int64_t out_w) { return ceil_div(out_w, tile_of(out_w)) * tile_of(out_w); }

// The same place in the rings of successive vectors must not fall on the same few sets of the cache.
inline int64_t odd_lines(int64_t vectors) { return vectors | 1; }

inline int64_t padded_width(const DwconvParams& p) {
  return (width_in_tiles(p.out_w) - 1) * p.stride + p.kernel_size;
}

// One output row of kLanes channels, [tiles * Tile][lanes], from the rows [ky_begin, ky_end) of the window that lie
// inside the map.
template <class C>
using ConvRow = void (*)(const C* const* rows, int ky_begin, int ky_end, const C* weights, int64_t tiles, C* out);

template <class C, int K, int S, int Tile>
void conv_row(const C* const* rows, int ky_begin, int ky_end, const C* weights, int64_t tiles, C* out) {
  constexpr int V = kLanes<C>;
  for (int64_t t = 0; t < tiles; ++t) {
    Vec<C> acc[Tile] = {};
    for (int ky = ky_begin; ky < ky_end; ++ky) {
      const C* in = rows[ky] + t * Tile * S * V;
      Vec<C> w[K];
#pragma GCC unroll 8
      for (int kx = 0; kx < K; ++kx) w[kx] = load(weights + (ky * K + kx) * V);
#pragma GCC unroll 32
      for (int j = 0; j < (Tile - 1) * S + K; ++j) {
        const Vec<C> v = in_register(load(in + j * V));
#pragma GCC unroll 8
        for (int kx = 0; kx < K; ++kx)
          if (j >= kx && (j - kx) % S == 0 && (j - kx) / S < Tile) acc[(j - kx) / S] += v * w[kx];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Tile; ++i) store(out + (t * Tile + i) * V, acc[i]);
  }
}

template <class T>
void run_channels_last(const DwconvParams& p, const Unit& u, ConvRow<compute_t<T>> conv, compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int k = p.kernel_size;
  const int64_t vectors = ceil_div(u.channels, V), width = padded_width(p), tiles = ceil_div(p.out_w, tile_of(p.out_w));
  const int64_t left = min64(p.pad_left, width), columns = min64(p.x.w, width - left);
  const int64_t row_size = width * V, ring_size = odd_lines(k * width) * V;
  const int64_t line_size = odd_lines(width_in_tiles(p.out_w)) * V;
  const int last_lanes = static_cast<int>((u.channels - 1) % V + 1);
  C* rings = scratch;                     // [vectors][k][width][lanes]
  C* lines = rings + vectors * ring_size;  // [vectors][width_in_tiles][lanes]: one output row before the epilogue
  Sums<C>* sums = reinterpret_cast<Sums<C>*>(lines + vectors * line_size);
  Scale<C>* prologue = reinterpret_cast<Scale<C>*>(sums + vectors);
  Scale<C>* epilogue = prologue + vectors;
  const Transform<T, C> stage = transform_for<T, C>(p.prologue.activation, false);
  const Transform<C, T> finish = transform_for<C, T>(p.epilogue.activation, p.reduce != Reduce::kNone);

  for (int64_t i = 0; i < vectors * ring_size; i += V) store(rings + i, Vec<C>{});
  for (int64_t v = 0; v < vectors; ++v) {
    const int lanes = v < vectors - 1 ? V : last_lanes;
    prologue[v] = Scale<C>::lanes(p.prologue, u.c + v * V, lanes);
    epilogue[v] = Scale<C>::lanes(p.epilogue, u.c + v * V, lanes);
    sums[v] = Sums<C>{};
  }

  int64_t staged = max64(u.row * p.stride - p.pad_top, 0);
  for (int64_t row = u.row; row < u.row + u.rows; ++row) {
    const int64_t top = row * p.stride - p.pad_top;
    const int ky_begin = static_cast<int>(min64(max64(-top, 0), k));
    const int ky_end = static_cast<int>(max64(min64(p.x.h - top, k), ky_begin));
    for (int64_t in = max64(staged, top); in < top + ky_end; ++in)
      stage({row_of<T>(p.x, u.n, u.c, in), p.x.stride_w, V * p.x.stride_c, p.x.stride_c,
             rings + in % k * row_size + left * V, V, ring_size, columns, vectors, last_lanes, 1},
            prologue, nullptr);
    staged = max64(staged, top + ky_end);
    for (int64_t v = 0; v < vectors; ++v) {
      const C* window[kMaxKernelSize];
      for (int ky = ky_begin; ky < ky_end; ++ky) window[ky] = rings + v * ring_size + (top + ky) % k * row_size;
      const C* weights = static_cast<const C*>(p.packed) + (u.c + v * V) * k * k;
      conv(window, ky_begin, ky_end, weights, tiles, lines + v * line_size);
      if (row == u.row && p.reduce == Reduce::kStatistics)
        sums[v].origin = first_value<T>(p, lines + v * line_size, epilogue[v]);
    }
    T* y = static_cast<T*>(p.y) + (u.n * p.out_h + row) * p.out_w * p.x.c + u.c;
    finish({lines, V, line_size, 1, y, p.x.c, V, p.out_w, vectors, last_lanes, 1}, epilogue, sums);
  }
  if (p.reduce == Reduce::kNone) return;
  for (int64_t c = 0; c < u.channels; ++c) {
    const Sums<C>& s = sums[c / V];
    write_partial(p.partials, p.reduce, p.x.c, u.partial, u.c + c, s.origin[c % V], s.sum[c % V], s.square[c % V],
                  static_cast<double>(u.rows * p.out_w));
  }
}

// --- NCHW: lanes are columns ------------------------------------------------------------------------------------------
//
// A unit is a group of planes that stand side by side in a row, the zero columns between them shared, so that narrow
// maps still fill a vector. The rows of a band are staged in scratch, converted, normalised, activated and padded, the
// even and the odd columns apart for stride 2: [rows][stride][length]. Then kRowBlock output rows are accumulated at
// once, so that a loaded vector serves up to k of them.

constexpr int kRowBlock = 7;

struct PlaneLayout {
  int64_t pitch;    // output columns from one plane to the next
  int64_t group;    // planes in a unit
  int64_t vectors;  // of a packed output row
  int64_t length;   // of a staged row of one phase
};

template <class C>
PlaneLayout plane_layout(const DwconvParams& p) {
  constexpr int64_t V = kLanes<C>;
  const int64_t s = p.stride, right = max64((p.out_w - 1) * s + p.kernel_size - p.pad_left - p.x.w, 0);
  PlaneLayout l;
  l.pitch = max64(ceil_div(p.x.w + max64(p.pad_left, right), s), p.out_w);
  l.group = p.out_w > V ? 1 : max64(min64((V - p.out_w) / l.pitch + 1, p.x.c), 1);
  l.vectors = ceil_div((l.group - 1) * l.pitch + p.out_w, V);
  l.length = round_up<C>(max64(l.vectors * V, l.group * l.pitch) + p.kernel_size + p.pad_left);
  return l;
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
void run_planes(const DwconvParams& p, const Unit& u, ConvRows<compute_t<T>> conv, compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>, R = kRowBlock;
  const PlaneLayout l = plane_layout<C>(p);
  const int64_t s = p.stride, taps = p.kernel_size * p.kernel_size;
  const int64_t blocks = ceil_div(u.rows, R), in_rows = (blocks * R - 1) * s + p.kernel_size;
  const int64_t top = u.row * s - p.pad_top, in_row = s * l.length, out_row = l.vectors * V;
  C* weights = scratch;                        // [taps][lanes], in each lane the weights of its plane
  C* staged = weights + taps * V;              // [in_rows][stride][length]
  C* wide = staged + in_rows * in_row;         // [stride * length]: a row before its even and odd columns are parted
  C* raw = wide + in_row;                      // [blocks * R][out_row]
  C* plane = raw + blocks * R * out_row + V;   // [rows * out_w]

  const C* packed = static_cast<const C*>(p.packed) + u.c * taps;
  for (int64_t t = 0; t < taps; ++t) {
    Vec<C> w = broadcast(packed[t]);
    for (int64_t g = 1; g < u.channels; ++g)
      w = lane_index<C>() < static_cast<C>(g * l.pitch) ? w : broadcast(packed[g * taps + t]);
    store(weights + t * V, w);
  }

  const int64_t first = max64(-top, 0), last = max64(min64(p.x.h - top, in_rows), first);
  const Transform<T, C> stage = transform_for<T, C>(p.prologue.activation, false);
  auto stage_rows = [&](int64_t row, int64_t rows, C* out) {
    for (int64_t i = 0; i < rows * in_row; i += V) store(out + i, Vec<C>{});
    for (int64_t g = 0; g < u.channels; ++g) {
      const Scale<C> scale = Scale<C>::one(p.prologue, u.c + g);
      stage({row_of<T>(p.x, u.n, u.c + g, top + row), p.x.stride_h, V * p.x.stride_w, p.x.stride_w,
             out + g * l.pitch * s + p.pad_left, in_row, V, rows, ceil_div(p.x.w, V),
             static_cast<int>((p.x.w - 1) % V + 1), 0},
            &scale, nullptr);
    }
  };
  if (s == 1) {
    stage_rows(first, last - first, staged + first * in_row);
  } else {
    for (int64_t row = first; row < last; ++row) {
      stage_rows(row, 1, wide);
      C *even = staged + row * in_row, *odd = even + l.length;
      for (int64_t i = 0; i < l.length; ++i) {
        even[i] = wide[2 * i];
        odd[i] = wide[2 * i + 1];
      }
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t offset = b * R * s;
    conv(staged + offset * in_row, l.length, first - offset, last - offset, weights, l.vectors, raw + b * R * out_row);
  }
  const Transform<C, T> finish = transform_for<C, T>(p.epilogue.activation, p.reduce != Reduce::kNone);
  for (int64_t g = 0; g < u.channels; ++g) {
    const int64_t c = u.c + g;
    const Scale<C> scale = Scale<C>::one(p.epilogue, c);
    const C* source = raw + g * l.pitch;
    T* y = static_cast<T*>(p.y) + ((u.n * p.x.c + c) * p.out_h + u.row) * p.out_w;
    Sums<C> sums;
    if (p.reduce == Reduce::kStatistics) sums.origin = broadcast(first_value<T>(p, source, scale)[0]);
    // Rows narrower than a vector are first moved together: each one's surplus lanes are overwritten by the next.
    const bool narrow = p.out_w < V;
    if (narrow)
      for (int64_t r = 0; r < u.rows; ++r) store(plane + r * p.out_w, load(source + r * out_row));
    const int64_t rows = narrow ? 1 : u.rows, length = narrow ? u.rows * p.out_w : p.out_w;
    finish({narrow ? plane : source, out_row, V, 1, y, p.out_w, V, rows, ceil_div(length, V),
            static_cast<int>((length - 1) % V + 1), 0},
           &scale, &sums);
    if (p.reduce == Reduce::kNone) continue;
    double sum = 0, square = 0;
    for (int i = 0; i < V; ++i) {
      sum += sums.sum[i];
      square += sums.square[i];
    }
    write_partial(p.partials, p.reduce, p.x.c, u.partial, c, sums.origin[0], sum, square,
                  static_cast<double>(u.rows * p.out_w));
  }
}

// --- dispatch ---------------------------------------------------------------------------------------------------------

constexpr int64_t kL1Bytes = 32 << 10;
constexpr int64_t kL2Bytes = 256 << 10;
constexpr int64_t kMinUnits = 32;  // enough for many cores to share evenly

template <class C>
void plan(DwconvParams& p) {
  constexpr int64_t V = kLanes<C>, size = sizeof(C);
  const int64_t k = p.kernel_size, s = p.stride;
  if (p.channels_last) {
    const int64_t vectors = ceil_div(p.x.c, V), width = padded_width(p);
    const int64_t fitting = max64(min64(kL2Bytes / (k * width * V * size), vectors), 1);
    const int64_t per_chunk = ceil_div(vectors, ceil_div(vectors, fitting));
    p.chunk_channels = per_chunk * V;
    p.chunks = ceil_div(vectors, per_chunk);
    p.packed_size = vectors * V * k * k;
    const int64_t wanted = ceil_div(kMinUnits, max64(p.x.n * p.chunks, 1));
    p.band_rows = max64(ceil_div(p.out_h, wanted), min64(p.out_h, 4 * k));
    const int64_t kept = static_cast<int64_t>(sizeof(Sums<C>) + 2 * sizeof(Scale<C>)) / size;
    p.scratch_size = per_chunk * ((odd_lines(k * width) + odd_lines(width_in_tiles(p.out_w))) * V + kept);
  } else {
    const PlaneLayout l = plane_layout<C>(p);
    p.chunk_channels = l.group;
    p.chunks = ceil_div(p.x.c, l.group);
    p.packed_size = p.x.c * k * k;
    const int64_t row_bytes = (s * s * l.length + l.vectors * V) * size;
    const int64_t rows = max64(kL1Bytes / row_bytes / kRowBlock, 1) * kRowBlock;
    p.band_rows = ceil_div(p.out_h, ceil_div(p.out_h, rows));
    const int64_t blocks = ceil_div(p.band_rows, kRowBlock), in_rows = (blocks * kRowBlock - 1) * s + k;
    p.scratch_size = k * k * V + (in_rows + 1) * s * l.length + blocks * kRowBlock * l.vectors * V + V +
                     round_up<C>(p.band_rows * p.out_w) + V;
  }
  p.bands = ceil_div(p.out_h, p.band_rows);
  p.units = p.x.n * p.chunks * p.bands;
}

template <class T>
void pack(const DwconvParams& p) {
  using C = compute_t<T>;
  constexpr int64_t V = kLanes<C>;
  const T* weight = static_cast<const T*>(p.weight);
  C* packed = static_cast<C*>(p.packed);
  const int64_t taps = p.kernel_size * p.kernel_size;
  if (p.channels_last) {
    for (int64_t c = 0; c < p.x.c; c += V)  // [C / V][k * k][V], zero past the last channel
      for (int64_t t = 0; t < taps; ++t)
        store(packed + c * taps + t * V,
              load_strided(weight + c * taps + t, taps, static_cast<int>(min64(p.x.c - c, V))));
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
  const ConvRow<C> row = tile_of(p.out_w) == 7 ? &conv_row<C, K, S, 7> : &conv_row<C, K, S, 8>;
  C* buffer = static_cast<C*>(scratch);
  for (int64_t i = first_unit; i < last_unit; ++i) {
    const Unit u = unit_at(p, i);
    p.channels_last ? run_channels_last<T>(p, u, row, buffer) : run_planes<T>(p, u, &conv_rows<C, K, S>, buffer);
  }
}

}  // namespace

namespace EFFK_ISA {

void dwconv_plan(DwconvParams& p) { p.dtype == Dtype::kFloat64 ? plan<double>(p) : plan<float>(p); }

void dwconv_pack(const DwconvParams& p) {
  with_storage(p.dtype, [&](auto storage) { pack<decltype(storage)>(p); });
}

void dwconv_run(const DwconvParams& p, int64_t first_unit, int64_t last_unit, void* scratch) {
  with_storage(p.dtype, [&](auto storage) {
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
