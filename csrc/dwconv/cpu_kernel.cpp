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

// --- channels_last: lanes are channels --------------------------------------------------------------------------------
//
// The rows that the current output row needs stand in a ring of k rows in scratch, converted, normalised, activated and
// padded with zero columns: [k][vectors][padded_w][lanes]. So each input element is activated once and no tap has a
// bounds check.

template <class C>
int64_t padded_width(const DwconvParams& p, int tile) {
  return (ceil_div(p.out_w, tile) * tile - 1) * p.stride + p.kernel_size;
}

// The tile of output columns that are accumulated in registers: the better divisor of the row.
inline int tile_of(int64_t out_w) { return ceil_div(out_w, 7) * 7 <= ceil_div(out_w, 8) * 8 ? 7 : 8; }

template <class C, int K, int S, int Tile>
inline void conv_row_channels(const C* const* rows, int ky_begin, int ky_end, const C* weights, int64_t tiles, C* out) {
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
inline void stage_channels(const DwconvParams& p, const T* x, int lanes, int64_t columns,
                           const Scale<compute_t<T>>& scale, compute_t<T>* out) {
  using C = compute_t<T>;
  const int64_t step = p.x.stride_w;
  auto copy = [&](auto read) EFFK_INLINE {
    if (!p.prologue.scale && p.prologue.activation == kIdentity) {
      for (int64_t i = 0; i < columns; ++i) store(out + i * kLanes<C>, read(x + i * step));
    } else {
      with_activation(p.prologue.activation, [&](auto act) EFFK_INLINE {
        for (int64_t i = 0; i < columns; ++i)
          store(out + i * kLanes<C>, activate<act.value>(scale(read(x + i * step))));
      });
    }
  };
  if (p.x.stride_c != 1)
    copy([&](const T* at) EFFK_INLINE { return load_strided(at, p.x.stride_c, lanes); });
  else if (lanes == kLanes<C>)
    copy([](const T* at) EFFK_INLINE { return load(at); });
  else
    copy([&](const T* at) EFFK_INLINE { return load_n(at, lanes); });
}

template <class T, int K, int S, int Tile>
void run_channels_last(const DwconvParams& p, const Unit& u, compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  const int64_t vectors = ceil_div(u.channels, V), width = padded_width<C>(p, Tile);
  const int64_t left = min64(p.pad_left, width), columns = min64(p.x.w, width - left);
  const int64_t row_size = vectors * width * V;
  C* ring = scratch;
  C* line = ring + K * row_size;  // one output row of one vector of channels
  Sums<C>* sums = reinterpret_cast<Sums<C>*>(line + round_up<C>(width) * V);

  for (int64_t i = 0; i < K * row_size; i += V) store(ring + i, Vec<C>{});
  for (int64_t v = 0; v < vectors; ++v) sums[v] = Sums<C>{};

  int64_t staged = max64(u.row * S - p.pad_top, 0);
  for (int64_t row = u.row; row < u.row + u.rows; ++row) {
    const int64_t top = row * S - p.pad_top;
    const int ky_begin = static_cast<int>(min64(max64(-top, 0), K));
    const int ky_end = static_cast<int>(max64(min64(p.x.h - top, K), ky_begin));
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c = u.c + v * V;
      const int lanes = static_cast<int>(min64(u.c + u.channels - c, V));
      const Scale<C> scale = Scale<C>::lanes(p.epilogue, c, lanes);
      for (int64_t in = max64(staged, top); in < top + ky_end; ++in)
        stage_channels<T>(p, row_of<T>(p.x, u.n, c, in), lanes, columns, Scale<C>::lanes(p.prologue, c, lanes),
                          ring + in % K * row_size + (v * width + left) * V);
      const C* rows[K];
      for (int ky = ky_begin; ky < ky_end; ++ky) rows[ky] = ring + (top + ky) % K * row_size + v * width * V;
      conv_row_channels<C, K, S, Tile>(rows, ky_begin, ky_end, static_cast<const C*>(p.packed) + c * K * K,
                                       ceil_div(p.out_w, Tile), line);
      T* y = static_cast<T*>(p.y) + ((u.n * p.out_h + row) * p.out_w) * p.x.c + c;
      with_epilogue(p.epilogue.activation, p.reduce, [&](auto act, auto sum) EFFK_INLINE {
        if (sum && row == u.row) sums[v].origin = origin_of<C>(p.reduce, rounded<T>(activate<act>(scale(load(line)))));
        transform<T, act, sum>(line, V, p.out_w, y, p.x.c, lanes, lanes, scale, sums[v]);
      });
    }
    staged = max64(staged, top + ky_end);
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
// even and the odd columns apart for stride 2: [rows][S][length]. Then R output rows are accumulated at once, so that a
// loaded vector serves up to k of them.

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
  l.length = round_up<C>(max64(l.vectors * V, l.group * l.pitch) + p.kernel_size) + V;
  return l;
}

// One row of one plane.
template <class T, int A>
inline EFFK_INLINE void stage_row(const DwconvParams& p, const T* x, const Scale<compute_t<T>>& scale,
                                  compute_t<T>* out) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>;
  auto one = [&](int64_t i, int n) EFFK_INLINE {
    const Vec<C> v = p.x.stride_w == 1 ? load_n(x + i, n) : load_strided(x + i * p.x.stride_w, p.x.stride_w, n);
    store(out + i, A == kIdentity && !p.prologue.scale ? v : keep_n<C>(activate<A>(scale(v)), n));
  };
  int64_t i = 0;
  for (; i + V <= p.x.w; i += V) one(i, V);
  if (i < p.x.w) one(i, static_cast<int>(p.x.w - i));
}

// `rows` of [S][length] from the first input row of the block on; those in [begin, end) lie inside the map.
template <class C, int K, int S>
inline void conv_rows(const C* staged, int64_t length, int64_t begin, int64_t end, const C* weights, int64_t vectors,
                      C* out) {
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

template <class T, int K, int S>
void run_planes(const DwconvParams& p, const Unit& u, compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int V = kLanes<C>, R = kRowBlock;
  const PlaneLayout l = plane_layout<C>(p);
  const int64_t blocks = ceil_div(u.rows, R), in_rows = (blocks * R - 1) * S + K, top = u.row * S - p.pad_top;
  const int64_t out_length = l.vectors * V;
  C* weights = scratch;                             // [k * k][V], lane by lane the weights of its plane
  C* staged = weights + K * K * V;                  // [in_rows][S][length]
  C* raw = staged + in_rows * S * l.length;         // [blocks * R][out_length]
  C* plane = raw + blocks * R * out_length + V;     // [rows * out_w]
  C* line = plane + round_up<C>(u.rows * p.out_w) + V;  // [S * length], one row before its phases are parted

  const C* packed = static_cast<const C*>(p.packed) + u.c * K * K;
  for (int t = 0; t < K * K; ++t)
    for (int i = 0; i < V; ++i) weights[t * V + i] = packed[min64(i / l.pitch, u.channels - 1) * K * K + t];

  const int64_t first = max64(-top, 0), last = max64(min64(p.x.h - top, in_rows), first);
  if (S == 2)
    for (int64_t i = 0; i < S * l.length; i += V) store(line + i, Vec<C>{});
  with_activation(p.prologue.activation, [&](auto act) EFFK_INLINE {
    for (int64_t row = first; row < last; ++row) {
      C* out = staged + row * S * l.length;
      C* target = S == 1 ? out : line;
      if (S == 1)
        for (int64_t i = 0; i < l.length; i += V) store(out + i, Vec<C>{});
      for (int64_t g = 0; g < u.channels; ++g)
        stage_row<T, act>(p, row_of<T>(p.x, u.n, u.c + g, top + row), Scale<C>::one(p.prologue, u.c + g),
                          target + g * l.pitch * S + p.pad_left);
      if (S == 2)
        for (int64_t i = 0; i < l.length; ++i) {
          out[i] = line[2 * i];
          out[l.length + i] = line[2 * i + 1];
        }
    }
  });
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t offset = b * R * S;
    conv_rows<C, K, S>(staged + offset * S * l.length, l.length, first - offset, last - offset, weights, l.vectors,
                       raw + b * R * out_length);
  }
  for (int64_t g = 0; g < u.channels; ++g) {
    const int64_t c = u.c + g;
    const Scale<C> scale = Scale<C>::one(p.epilogue, c);
    const C* source = raw + g * l.pitch;
    T* y = static_cast<T*>(p.y) + ((u.n * p.x.c + c) * p.out_h + u.row) * p.out_w;
    Sums<C> sums;
    with_epilogue(p.epilogue.activation, p.reduce, [&](auto act, auto sum) EFFK_INLINE {
      if (sum) sums.origin = broadcast(origin_of<C>(p.reduce, rounded<T>(activate<act>(scale(load(source)))))[0]);
      auto emit = [&](const C* in, int64_t count, T* out) EFFK_INLINE {
        transform<T, act, sum>(in, V, ceil_div(count, V), out, V, V, static_cast<int>((count - 1) % V + 1), scale, sums);
      };
      if (p.out_w < V) {
        // Close the gaps: each row's surplus lanes are overwritten by the next row.
        for (int64_t r = 0; r < u.rows; ++r) store(plane + r * p.out_w, load(source + r * out_length));
        emit(plane, u.rows * p.out_w, y);
      } else {
        for (int64_t r = 0; r < u.rows; ++r) emit(source + r * out_length, p.out_w, y + r * p.out_w);
      }
    });
    if (p.reduce == Reduce::kNone) continue;
    double sum = 0, square = 0;
    for (int i = 0; i < V; ++i) {
      sum += sums.sum[i];
      square += sums.square[i];
    }
    write_partial(p.partials, p.reduce, p.x.c, u.partial, c, sums.origin[0], sum, square, static_cast<double>(u.rows * p.out_w));
  }
}

// --- dispatch ---------------------------------------------------------------------------------------------------------

constexpr int64_t kL1Bytes = 32 << 10;
constexpr int64_t kMinUnits = 32;  // enough for many cores to share evenly

template <class C>
void plan(DwconvParams& p) {
  constexpr int64_t V = kLanes<C>;
  const int64_t k = p.kernel_size, s = p.stride;
  if (p.channels_last) {
    const int64_t vectors = ceil_div(p.x.c, V), width = padded_width<C>(p, tile_of(p.out_w));
    const int64_t fitting = max64(min64(kL1Bytes / static_cast<int64_t>(sizeof(C)) / (k * width * V), vectors), 1);
    const int64_t per_chunk = ceil_div(vectors, ceil_div(vectors, fitting));
    p.chunk_channels = per_chunk * V;
    p.chunks = ceil_div(vectors, per_chunk);
    p.packed_size = vectors * V * k * k;
    const int64_t wanted = ceil_div(kMinUnits, max64(p.x.n * p.chunks, 1));
    p.band_rows = max64(ceil_div(p.out_h, wanted), min64(p.out_h, 4 * k));
    p.scratch_size = k * per_chunk * width * V + round_up<C>(width) * V +
                     per_chunk * static_cast<int64_t>(sizeof(Sums<C>) / sizeof(C));
  } else {
    const PlaneLayout l = plane_layout<C>(p);
    p.chunk_channels = l.group;
    p.chunks = ceil_div(p.x.c, l.group);
    p.packed_size = p.x.c * k * k;
    const int64_t row_bytes = (s * s * l.length + l.vectors * V) * static_cast<int64_t>(sizeof(C));
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
  auto value = [&](int64_t c, int64_t t) {
    const T* at = weight + c * taps + t;
    if constexpr (sizeof(T) == sizeof(C))
      return *at;
    else
      return load_n(at, 1)[0];
  };
  if (p.channels_last) {
    for (int64_t c = 0; c < round_up<C>(p.x.c); c += V)  // [C / V][k * k][V], zero past the last channel
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t i = 0; i < V; ++i) packed[c * taps + t * V + i] = c + i < p.x.c ? value(c + i, t) : C(0);
  } else {
    for (int64_t i = 0; i < p.x.c * taps; ++i) packed[i] = value(0, i);
  }
}

template <class T, int K, int S>
void run_unit(const DwconvParams& p, const Unit& u, compute_t<T>* scratch) {
  if (!p.channels_last)
    run_planes<T, K, S>(p, u, scratch);
  else if (tile_of(p.out_w) == 7)
    run_channels_last<T, K, S, 7>(p, u, scratch);
  else
    run_channels_last<T, K, S, 8>(p, u, scratch);
}

template <class T, int K>
void run_strided(const DwconvParams& p, const Unit& u, compute_t<T>* scratch) {
  p.stride == 1 ? run_unit<T, K, 1>(p, u, scratch) : run_unit<T, K, 2>(p, u, scratch);
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
    auto* buffer = static_cast<compute_t<T>*>(scratch);
    for (int64_t i = first_unit; i < last_unit; ++i) {
      const Unit u = unit_at(p, i);
      if (p.kernel_size == 3) run_strided<T, 3>(p, u, buffer);
      if (p.kernel_size == 5) run_strided<T, 5>(p, u, buffer);
      if (p.kernel_size == 7) run_strided<T, 7>(p, u, buffer);
    }
  });
}

}  // namespace EFFK_ISA
}  // namespace effk
