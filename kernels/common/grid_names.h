#pragma once

#include <string>

#include "kernels/common/check.h"
#include "kernels/fake_quantize.h"

/// The words that name a grid at the boundary to Python and in files.
namespace moq::kernels {

/// "per_tensor", "per_channel" or "per_group". @throws moq::Error on any other string.
inline Granularity parse_granularity(const std::string& name) {
  if (name == "per_tensor") return Granularity::kPerTensor;
  if (name == "per_channel") return Granularity::kPerChannel;
  MOQ_CHECK(name == "per_group", "granularity must be per_tensor, per_channel or per_group, got ",
            name);
  return Granularity::kPerGroup;
}

/// "symmetric" or "asymmetric". @throws moq::Error on any other string.
inline QuantMode parse_mode(const std::string& name) {
  if (name == "symmetric") return QuantMode::kSymmetric;
  MOQ_CHECK(name == "asymmetric", "mode must be symmetric or asymmetric, got ", name);
  return QuantMode::kAsymmetric;
}

/// "nearest" or "stochastic". @throws moq::Error on any other string.
inline Rounding parse_rounding(const std::string& name) {
  if (name == "nearest") return Rounding::kNearest;
  MOQ_CHECK(name == "stochastic", "rounding must be nearest or stochastic, got ", name);
  return Rounding::kStochastic;
}

}  // namespace moq::kernels
