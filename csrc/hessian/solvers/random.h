#pragma once

#include <cstdint>
#include <span>

namespace moq::hessian {

/// Names one random vector: the same vector for the same name on every machine, thread and rank.
struct RandomStream {
  std::uint64_t seed = 0;
  std::uint32_t tensor = 0;  ///< which parameter of the model
  std::uint32_t probe = 0;   ///< which draw
  std::uint32_t batch = 0;   ///< which batch of data
};

/// Fills `values` with +1 and -1, equally likely and independent (Rademacher).
void fill_rademacher(std::span<float> values, const RandomStream& stream);
void fill_rademacher(std::span<double> values, const RandomStream& stream);

/// Fills `values` with independent multiples of 2^-23 in [-1, 1).
template <typename Scalar>
void fill_uniform(std::span<Scalar> values, const RandomStream& stream);

}  // namespace moq::hessian
