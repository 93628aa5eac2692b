#pragma once

#include <c10/util/Exception.h>

#include <string_view>

#include "kernels/fake_quantize.h"

/// The words that name a grid in operators' schemas and in Python. Each function throws ValueError
/// (Python's), naming `where`, for a word that it does not know.
namespace moq {

/// "per_tensor", "per_channel", "per_group" or "per_rows".
inline kernels::Granularity parse_granularity(const char* where, std::string_view name) {
  if (name == "per_tensor") return kernels::Granularity::kPerTensor;
  if (name == "per_channel") return kernels::Granularity::kPerChannel;
  if (name == "per_group") return kernels::Granularity::kPerGroup;
  TORCH_CHECK_VALUE(name == "per_rows", where,
                    ": granularity must be per_tensor, per_channel, per_group or per_rows, got ",
                    name);
  return kernels::Granularity::kPerRows;
}

/// "symmetric", "asymmetric", "ternary" or "binary".
inline QuantMode parse_mode(const char* where, std::string_view name) {
  if (name == "symmetric") return QuantMode::kSymmetric;
  if (name == "asymmetric") return QuantMode::kAsymmetric;
  if (name == "ternary") return QuantMode::kTernary;
  TORCH_CHECK_VALUE(name == "binary", where,
                    ": mode must be symmetric, asymmetric, ternary or binary, got ", name);
  return QuantMode::kBinary;
}

/// "absmax" (the extent of the weights), "mse" or "given".
inline ScaleRule parse_scale_rule(const char* where, std::string_view name) {
  if (name == "absmax") return ScaleRule::kExtent;
  if (name == "mse") return ScaleRule::kMse;
  TORCH_CHECK_VALUE(name == "given", where, ": scale_rule must be absmax, mse or given, got ",
                    name);
  return ScaleRule::kGiven;
}

/// "nearest" or "stochastic".
inline Rounding parse_rounding(const char* where, std::string_view name) {
  if (name == "nearest") return Rounding::kNearest;
  TORCH_CHECK_VALUE(name == "stochastic", where, ": rounding must be nearest or stochastic, got ",
                    name);
  return Rounding::kStochastic;
}

}  // namespace moq
