// What a block consists of, in the order of its ops' schemas.
#pragma once

#include "common/tensor.h"

#define EFFK_BLOCK_PARAMETERS                                                                                        \
  std::optional<Tensor> expand, std::optional<Tensor> mean1, std::optional<Tensor> var1,                             \
      std::optional<Tensor> gamma1, std::optional<Tensor> beta1, double eps1, int64_t act1, const Tensor &depthwise, \
      const Tensor &mean2, const Tensor &var2, std::optional<Tensor> gamma2, std::optional<Tensor> beta2,            \
      double eps2, int64_t act2, std::optional<Tensor> w1, std::optional<Tensor> b1, std::optional<Tensor> w2,       \
      std::optional<Tensor> b2, int64_t squeeze_act, int64_t gate, const Tensor &project, const Tensor &mean3,       \
      const Tensor &var3, std::optional<Tensor> gamma3, std::optional<Tensor> beta3, double eps3
#define EFFK_BLOCK_ARGUMENTS                                                                                           \
  expand, mean1, var1, gamma1, beta1, eps1, act1, depthwise, mean2, var2, gamma2, beta2, eps2, act2, w1, b1, w2, b2, \
      squeeze_act, gate, project, mean3, var3, gamma3, beta3, eps3
