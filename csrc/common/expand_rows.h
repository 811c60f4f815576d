// Rows of the output of a 1x1 convolution that is never stored: the CPU kernels after it have them computed as they go
// down a map, of a chunk of its channels and a few rows at a time. Only inside csrc/*/cpu_kernel.cpp, as vec.h.
#pragma once

#include "matmul.h"
#include "tile.h"

namespace effk {
namespace {

// The packed weight, in elements: chunk after chunk.
template <class T>
int64_t packed_expansion_size(const Expansion& e, int64_t chunks, int64_t chunk_channels) {
  return e.x.data ? chunks * packed_size<Product<T>>(chunk_channels, e.x.c) : 0;
}

template <class T>
void pack_expansion(const Expansion& e, int64_t channels, int64_t chunk_channels, compute_t<T>* packed) {
  const T* weight = static_cast<const T*>(e.weight);
  for (int64_t c = 0; e.x.data && c < channels; c += chunk_channels)
    pack_weight<Product<T>>(weight + c * e.x.c, min64(chunk_channels, channels - c), e.x.c,
                            packed + packed_expansion_size<T>(e, c / chunk_channels, chunk_channels));
}

template <class T>
class ExpandedRows {
 public:
  using C = compute_t<T>;

  // Of one chunk, which has `channels` channels. `scratch`: scratch_size() elements.
  ExpandedRows(const Expansion& e, const C* packed, int64_t chunk, int64_t chunk_channels, int64_t channels, C* scratch)
      : e_(e), sizes_(e, chunk_channels), panels_(channels), product_(sizes_.pixels),
        packed_(packed + packed_expansion_size<T>(e, chunk, chunk_channels)), rows_(scratch) {}

  static int64_t scratch_size(const Expansion& e, int64_t chunk_channels) {
    return e.x.data ? Sizes(e, chunk_channels).all : 0;
  }

  // Row `row` of image n, where none from `end` on will be asked for: [w][stride()], valid until the next call. Rows are
  // asked for in ascending order.
  const C* row(int64_t n, int64_t row, int64_t end) {
    if (row >= end_) {
      first_ = row;
      end_ = min64(row + sizes_.rows, end);
      expand(n, row * e_.x.w, (end_ - row) * e_.x.w);
    }
    return rows_ + (row - first_) * e_.x.w * sizes_.stride;
  }

  int64_t stride() const { return sizes_.stride; }

 private:
  struct Sizes {
    int64_t rows, pixels, stride;  // of a group of rows
    int64_t x, left, all;          // elements

    Sizes(const Expansion& e, int64_t chunk_channels)
        : rows(min64(ceil_div(kGroupPixels, e.x.w), e.x.h)), pixels(rows * e.x.w), stride(round_up<C>(chunk_channels)),
          x(pixels * round_up<C>(e.x.c)), left(Product<T>::left_size(pixels, e.x.c)), all(pixels * stride + x + left) {}
  };

  void expand(int64_t n, int64_t first, int64_t pixels) {
    C *x_buffer = rows_ + sizes_.pixels * sizes_.stride, *left_buffer = x_buffer + sizes_.x;
    const Tile<C> x = load_tile<T>(e_.x, n, first, pixels, 0, e_.x.c, x_buffer);
    const Rows<C> left = Product<T>::left({x.data, x.stride, 1, e_.x.c}, pixels, nullptr, left_buffer);
    for (int64_t i = 0; i < panels_.count; ++i)
      product_.store(left, pixels, packed_ + panels_.begin(i) * Product<T>::column_vector(e_.x.c), panels_.vectors(i),
                     rows_ + panels_.begin(i) * kLanes<C>, sizes_.stride, kLanes<C>);
  }

  const Expansion& e_;
  const Sizes sizes_;
  const Panels<C> panels_;
  const Product<T> product_;
  const C* packed_;
  C* rows_;
  int64_t first_ = 0, end_ = 0;
};

}  // namespace
}  // namespace effk
