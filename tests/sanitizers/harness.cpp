#include "harness.h"

#include <cmath>
#include <cstdio>
#include <random>

#include "common/cpu_isa.h"

namespace effk::sanitized {

static std::mt19937 generator;
static int thread_count;
static int checked;

Buffer Buffer::random(Dtype dtype, int64_t count) {
  Buffer buffer(dtype, count);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = generator();
    const float magnitude = std::ldexp(1 + (bits & 0x7f) / 128.0f, static_cast<int>(bits >> 7 & 7) % 5 - 3);
    const float value = bits >> 31 ? -magnitude : magnitude;
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    // Seven bits of mantissa: exact in every format.
    const uint16_t bfloat16 = word >> 16;
    const uint16_t half = (word >> 16 & 0x8000) | ((word >> 13 & 0x3ffff) - (112 << 10));
    void* at = static_cast<char*>(buffer.data()) + i * size_of(dtype);
    const double wide = value;
    switch (dtype) {
      case Dtype::kFloat64: std::memcpy(at, &wide, 8); break;
      case Dtype::kFloat32: std::memcpy(at, &value, 4); break;
      case Dtype::kFloat16: std::memcpy(at, &half, 2); break;
      case Dtype::kBFloat16: std::memcpy(at, &bfloat16, 2); break;
    }
  }
  return buffer;
}

bool Buffer::is_written() const {
  const std::string unwritten(element_, '\xff');
  for (size_t i = 0; i < bytes_; i += element_)
    if (std::memcmp(data_.get() + i, unwritten.data(), element_) == 0) return false;
  return true;
}

RandomMap::RandomMap(Dtype dtype, Layout layout, int64_t n, int64_t c, int64_t h, int64_t w)
    : channels_last(layout == Layout::kChannelsLast || layout == Layout::kSlicedChannelsLast), memory_(dtype, 0) {
  const bool sliced = layout == Layout::kSlicedNchw || layout == Layout::kSlicedChannelsLast;
  const int64_t whole[] = {n, c + 3 * sliced, h + 2 * sliced, w + sliced};
  int64_t stride[4];
  dense_strides(whole, channels_last, stride);
  const int64_t last = (n - 1) * stride[0] + (c - 1) * stride[1] + (h - 1) * stride[2] + (w - 1) * stride[3];
  memory_ = Buffer::random(dtype, 1 + last + 1);
  map = {static_cast<char*>(memory_.data()) + size_of(dtype), n, c, h, w, stride[0], stride[1], stride[2], stride[3]};
}

RandomAffine::RandomAffine(Dtype dtype, int64_t channels, bool scale, bool shift, int activation, int64_t rows)
    : scale_(Buffer::random(compute_dtype(dtype), rows * channels)),
      shift_(Buffer::random(compute_dtype(dtype), channels)) {
  affine = {scale ? scale_.data() : nullptr, shift ? shift_.data() : nullptr, activation};
}

RandomNorm::RandomNorm(Dtype dtype, int64_t channels, bool fixed, int activation)
    : values_(Buffer::random(compute_dtype(dtype), 5 * channels)) {
  const auto vector = [&](int i) {
    return static_cast<char*>(values_.data()) + i * channels * size_of(compute_dtype(dtype));
  };
  norm = {vector(0), vector(1), vector(2), fixed ? nullptr : vector(3), fixed ? nullptr : vector(4), activation};
}

Map output_map(const Buffer& memory, bool channels_last, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t sizes[] = {n, c, h, w};
  int64_t stride[4];
  dense_strides(sizes, channels_last, stride);
  return {memory.data(), n, c, h, w, stride[0], stride[1], stride[2], stride[3]};
}

void check(const std::string& name, const std::function<std::vector<Buffer>(int)>& compute) {
  const std::vector<Buffer> alone = compute(1), together = compute(thread_count);
  bool right = alone == together;
  for (const Buffer& output : alone) right = right && output.is_written();
  if (!right) {
    std::printf("%s: other bits on %d threads, or an output left unwritten\n", name.c_str(), thread_count);
    std::exit(1);
  }
  ++checked;
}

static std::vector<void (*)()>& all_cases() {
  static std::vector<void (*)()> all;
  return all;
}

Cases::Cases(void (*run)()) { all_cases().push_back(run); }

// What a sanitiser must find: a mistake of each kind, on request.
static void plant(const std::string& mistake) {
  const Buffer buffer(Dtype::kFloat32, 8);
  volatile float* values = static_cast<float*>(buffer.data());
  volatile int number = 1 << 30;
  if (mistake == "read beyond") static_cast<void>(values[8]);
  if (mistake == "overflow") number = number * 4;
  if (mistake == "race") parallel_for(2, 2, Dtype::kFloat32, 0, [&](int64_t, int64_t, void*) { values[0] = 1; });
}

}  // namespace effk::sanitized

// driver THREADS [MISTAKE]
int main(int argc, char** argv) {
  using namespace effk::sanitized;
  thread_count = std::atoi(argv[1]);
  if (argc > 2) {
    plant(argv[2]);
    return 0;
  }
  for (const auto run : all_cases()) run();
  std::printf("%d cases, %s, %d threads\n", checked, effk::cpu_isa_name(effk::cpu_isa()), thread_count);
}
