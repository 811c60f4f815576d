// From the gradient of an expanded map to those of x and of the weight, while its rows are in the cache. Only inside
// csrc/dwconv_backward/cpu_kernel.cpp.
#pragma once

#include "common/matmul.h"
#include "common/tile.h"
#include "dwconv_backward/cpu_kernel.h"

namespace effk {
namespace {

// The unit's rows [begin, end) of image n. Of each chunk of expanded channels, row after row comes in and is multiplied, a
// few at a time, by the weight and by x. The gradient of x adds up over the chunks before it is stored.
template <class T>
class ExpandBackward {
 public:
  using C = compute_t<T>;
  using P = Product<T>;

  struct Sizes {
    int64_t rows, pixels, stride;  // of a group of rows
    int64_t dz, x, panel, left, transposed, right, band, all;  // elements

    explicit Sizes(const DwconvBackwardParams& p)
        : rows(min64(ceil_div(kGroupPixels, p.x.w), p.band_rows)), pixels(rows * p.x.w),
          stride(round_up<C>(p.chunk_channels)), dz(pixels * stride),
          x(pixels * p.expand_padded), panel(pixels * kPanelVectors * kLanes<C>), left(P::left_size(pixels, p.chunk_channels)),
          transposed(P::left_size(p.chunk_channels, pixels)), right(P::right_size(pixels)),
          band(p.band_rows * p.x.w * p.expand_padded), all(dz + x + panel + left + transposed + right + band) {}
  };

  // The packed weight, in elements: chunk after chunk.
  static int64_t packed_size(const DwconvBackwardParams& p) {
    return p.chunks * effk::packed_size<P>(p.expand.x.c, p.chunk_channels);
  }

  static void pack(const DwconvBackwardParams& p, C* packed) {
    const int64_t columns = p.expand.x.c;
    for (int64_t c = 0; c < p.x.c; c += p.chunk_channels, packed += effk::packed_size<P>(columns, p.chunk_channels)) {
      const int64_t depth = min64(p.chunk_channels, p.x.c - c);
      pack_panels<P>(columns, depth, 0, depth, packed,
                     [&](int64_t k, int64_t n, int64_t column, int lanes, C* out, int64_t stride) {
        const T* from = static_cast<const T*>(p.expand.weight) + (c + k) * columns + column;
        for (int64_t i = 0; i < n; ++i) store(out + i * stride, load_n(from + i * columns, lanes));
      });
    }
  }

  ExpandBackward(const DwconvBackwardParams& p, const C* packed, int64_t n, int64_t begin, int64_t end, int64_t partial,
                 C* scratch)
      : p_(p), s_(p), product_(s_.pixels), panels_(p.expand.x.c), packed_(packed), n_(n), begin_(begin), end_(end),
        products_(static_cast<C*>(p.expand_products) + partial * p.x.c * p.expand_padded), dz_(scratch) {}

  void begin_chunk(int64_t chunk, int64_t channels) {
    chunk_ = chunk;
    channels_ = channels;
    first_ = begin_;
  }

  int64_t stride() const { return s_.stride; }

  // Where the gradient of row `row` goes, [w][stride()].
  C* row(int64_t row) { return dz_ + (row - first_) * p_.x.w * s_.stride; }

  void end_row(int64_t row) {
    if (row + 1 < end_ && row + 1 - first_ < s_.rows) return;
    multiply((row + 1 - first_) * p_.x.w);
    first_ = row + 1;
  }

  // After the last chunk.
  void finish() {
    if (p_.grad_x.data)
      store_tile<T>(p_.grad_x, n_, begin_ * p_.x.w, (end_ - begin_) * p_.x.w, 0, p_.expand.x.c, band(), p_.expand_padded);
  }

 private:
  C* band() const { return dz_ + s_.all - s_.band; }

  void multiply(int64_t pixels) {
    C *x_buffer = dz_ + s_.dz, *panel_buffer = x_buffer + s_.x, *left_buffer = panel_buffer + s_.panel;
    C *transposed_buffer = left_buffer + s_.left, *right_buffer = transposed_buffer + s_.transposed;
    const int64_t first = first_ * p_.x.w, wide = p_.expand.x.c;
    if (p_.grad_x.data) {
      const Rows<C> left = P::left({dz_, s_.stride, 1, channels_}, pixels, nullptr, left_buffer);
      const C* weight = packed_ + chunk_ * effk::packed_size<P>(wide, p_.chunk_channels);
      C* out = band() + (first - begin_ * p_.x.w) * p_.expand_padded;
      for (int64_t i = 0; i < panels_.count; ++i)
        into(chunk_ > 0, left, pixels, weight + panels_.begin(i) * P::column_vector(channels_), i, out, p_.expand_padded);
    }
    if (!p_.expand_products) return;
    const Rows<C> transposed = P::left({dz_, 1, s_.stride, pixels}, channels_, nullptr, transposed_buffer);
    const Tile<C> x = load_tile<T>(p_.expand.x, n_, first, pixels, 0, wide, x_buffer);
    for (int64_t i = 0; i < panels_.count; ++i) {
      const int64_t c = panels_.begin(i) * kLanes<C>, stride = panels_.vectors(i) * kLanes<C>;
      for (int64_t j = 0; j < stride; j += kLanes<C>) {
        const int lanes = static_cast<int>(min64(wide - c - j, kLanes<C>));
        const Vec<C> centre = lanes_of<C>(p_.centre, c + j, lanes, 0);
        for (int64_t k = 0; k < pixels; ++k) store(panel_buffer + k * stride + j, x.at(k, c + j) - centre);
      }
      const C* right = P::right(panel_buffer, pixels, panels_.vectors(i), right_buffer);
      into(first_ > begin_, transposed, channels_, right, i, products_ + chunk_ * p_.chunk_channels * p_.expand_padded, p_.expand_padded);
    }
  }

  // Panel i of a product, to be added to `out` or to begin it.
  void into(bool add, const Rows<C>& left, int64_t count, const C* right, int64_t i, C* out, int64_t out_row) const {
    out += panels_.begin(i) * kLanes<C>;
    if (add)
      product_.add(left, count, right, panels_.vectors(i), out, out_row, kLanes<C>);
    else
      product_.store(left, count, right, panels_.vectors(i), out, out_row, kLanes<C>);
  }

  const DwconvBackwardParams& p_;
  const Sizes s_;
  const P product_;
  const Panels<C> panels_;
  const C* packed_;
  const int64_t n_, begin_, end_;
  C *products_, *dz_;
  int64_t chunk_ = 0, channels_ = 0, first_ = 0;
};

}  // namespace
}  // namespace effk
