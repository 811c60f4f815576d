// Activations and gates: their codes (the same in effkernels/ops/_activation.py) and their formulas.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define EFFK_HOST_DEVICE __host__ __device__
#else
#define EFFK_HOST_DEVICE
#endif

namespace effk {

enum Activation : int {
  kIdentity = 0,
  kSilu = 1,
  kRelu = 2,
  kRelu6 = 3,
  kHardswish = 4,
  kSigmoid = 5,
  kHardsigmoid = 6,
};

// Internal linkage: a unit compiled for one instruction set must not offer its copy to the others.
// NaN passes through every formula, as in PyTorch.
static inline EFFK_HOST_DEVICE float clamp(float z, float low, float high) {
  return z < low ? low : z > high ? high : z;
}

static inline EFFK_HOST_DEVICE float logistic(float z) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, 1.0f + __expf(-z));
#else
  return 1.0f / (1.0f + expf(-z));
#endif
}

static inline EFFK_HOST_DEVICE float activate(float z, int code) {
  switch (code) {
    case kSilu:
      return z * logistic(z);
    case kRelu:
      return z < 0.0f ? 0.0f : z;
    case kRelu6:
      return clamp(z, 0.0f, 6.0f);
    case kHardswish:
      return z * clamp(z + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    case kSigmoid:
      return logistic(z);
    case kHardsigmoid:
      return clamp(z + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    default:
      return z;
  }
}

}  // namespace effk
