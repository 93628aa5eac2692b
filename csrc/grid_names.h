#pragma once

#include <c10/util/Exception.h>

#include <string_view>

#include "kernels/fake_quantize.h"

/// The words that name a grid in operators' schemas and in Python. Each function throws ValueError
/// (Python's), naming `where`, for a word that it does not know.
namespace moq {

/// "per_tensor", "per_channel" or "per_group".
inline kernels::Granularity parse_granularity(const char* where, std::string_view name) {
  if (name == "per_tensor") return kernels::Granularity::kPerTensor;
  if (name == "per_channel") return kernels::Granularity::kPerChannel;
  TORCH_CHECK_VALUE(name == "per_group", where,
                    ": granularity must be per_tensor, per_channel or per_group, got ", name);
  return kernels::Granularity::kPerGroup;
}

/// "symmetric" or "asymmetric".
inline QuantMode parse_mode(const char* where, std::string_view name) {
  if (name == "symmetric") return QuantMode::kSymmetric;
  TORCH_CHECK_VALUE(name == "asymmetric", where, ": mode must be symmetric or asymmetric, got ",
                    name);
  return QuantMode::kAsymmetric;
}

/// "nearest" or "stochastic".
inline Rounding parse_rounding(const char* where, std::string_view name) {
  if (name == "nearest") return Rounding::kNearest;
  TORCH_CHECK_VALUE(name == "stochastic", where, ": rounding must be nearest or stochastic, got ",
                    name);
  return Rounding::kStochastic;
}

}  // namespace moq
