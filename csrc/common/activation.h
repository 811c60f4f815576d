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

// Each is s(z) or z s(z), with s either the logistic function or a line cut off at both ends.
struct ActivationForm {
  bool logistic, times_z;
  float slope, offset, low, high;
};

// Internal linkage: a unit compiled for one instruction set must not offer its copy to the others.
static inline ActivationForm activation_form(int code) {
  constexpr float kSixth = 1.0f / 6.0f;
  switch (code) {
    case kSilu:
      return {true, true, 0, 0, 0, 0};
    case kRelu:
      return {false, false, 1, 0, 0, INFINITY};
    case kRelu6:
      return {false, false, 1, 0, 0, 6};
    case kHardswish:
      return {false, true, kSixth, 0.5f, 0, 1};
    case kSigmoid:
      return {true, false, 0, 0, 0, 0};
    case kHardsigmoid:
      return {false, false, kSixth, 0.5f, 0, 1};
    default:
      return {false, false, 1, 0, -INFINITY, INFINITY};
  }
}

struct Activated {
  float value, slope;
};

// act(z) and act'(z), as PyTorch has it where act has a kink.
static inline EFFK_HOST_DEVICE Activated activate_with_slope(float z, const ActivationForm& form) {
  float s, slope;
  if (form.logistic) {
#ifdef __CUDA_ARCH__
    s = __fdividef(1.0f, 1.0f + __expf(-z));
#else
    s = 1.0f / (1.0f + expf(-z));
#endif
    slope = s * (1.0f - s);
  } else {
    s = form.slope * z + form.offset;
    const bool flat = (s <= form.low && form.low > -INFINITY) || (s >= form.high && form.high < INFINITY);
    slope = flat ? 0.0f : form.slope;
    s = s < form.low ? form.low : s > form.high ? form.high : s;  // NaN stays
  }
  return form.times_z ? Activated{z * s, fmaf(z, slope, s)} : Activated{s, slope};
}

static inline EFFK_HOST_DEVICE float activate(float z, const ActivationForm& form) {
  return activate_with_slope(z, form).value;
}

}  // namespace effk
