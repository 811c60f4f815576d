// What a kernel does to each value it loads or stores: batch normalisation, then an activation.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace effk {

// Vectors [C] in the dtype of the map, or in float32 where their bit is set in `float32`.
struct Transform {
  const void *mean, *var, *gamma, *beta;  // no mean: no normalisation; no gamma: 1; no beta: 0
  float eps;
  uint32_t float32;  // bit 0: mean, 1: var, 2: gamma, 3: beta
  ActivationForm activation;
  bool active;  // false: the identity
};

// gamma (z - mean) / sqrt(var + eps) + beta of one channel. A large mean must be subtracted, not folded into beta.
struct Normalize {
  float mean, scale, beta;

  EFFK_HOST_DEVICE float operator()(float z) const { return (z - mean) * scale + beta; }
};

// The way back through a Transform with a mean: from the gradient of what came out, grad * scale + shift, to that of z.
struct BackwardTransform {
  Transform forward;
  const float *scale, *shift;  // [N, C]; without them 1 and 0
  const float* means;          // [2, C], over batch and map, of dz and of dz * zhat; null where the statistics are fixed
};

inline Transform make_transform(const void* mean, const void* var, const void* gamma, const void* beta, float eps,
                                uint32_t float32, int activation) {
  return {mean, var, gamma, beta, eps, float32, activation_form(activation), mean || activation != kIdentity};
}

}  // namespace effk
