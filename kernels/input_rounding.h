#pragma once

#include <cstdint>

#include "kernels/quant_grid.h"

namespace moq::kernels {

/// How `linear` reads its input when the weight holds integers (float weights: kFloat32). The 8-bit
/// grids are those of quantize_activation (kernels/quantize.h).
enum class InputMode : std::uint8_t {
  kFloat32,                ///< the input as it is: exact weight-only arithmetic
  kDynamicInt8,            ///< each row rounded to the symmetric grid of its own absmax
  kStaticInt8,             ///< every row rounded to the symmetric grid of a given scale
  kDynamicAsymmetricInt8,  ///< each row rounded to the asymmetric grid of its own extent
  kStaticAsymmetricInt8,   ///< every row rounded to that of a given scale and zero point
};

constexpr bool is_dynamic(InputMode mode) {
  return mode == InputMode::kDynamicInt8 || mode == InputMode::kDynamicAsymmetricInt8;
}
constexpr bool is_static(InputMode mode) {
  return mode == InputMode::kStaticInt8 || mode == InputMode::kStaticAsymmetricInt8;
}

/// The mode of the grid that the input is rounded to.
MOQ_HOST_DEVICE constexpr QuantMode grid_mode(InputMode mode) {
  return mode == InputMode::kDynamicAsymmetricInt8 || mode == InputMode::kStaticAsymmetricInt8
             ? QuantMode::kAsymmetric
             : QuantMode::kSymmetric;
}

/// "float32", "dynamic_int8", "static_int8", "dynamic_asymmetric_int8" or "static_asymmetric_int8".
constexpr const char* name_of(InputMode mode) {
  constexpr const char* kNames[] = {"float32", "dynamic_int8", "static_int8",
                                    "dynamic_asymmetric_int8", "static_asymmetric_int8"};
  return kNames[static_cast<int>(mode)];
}

/// An input mode, with the grid of a static one.
struct InputRounding {
  InputMode mode = InputMode::kFloat32;
  float scale = 0.0F;           ///< step size of a static mode, finite, >= min_scale(float32)
  std::int32_t zero_point = 0;  ///< of kStaticAsymmetricInt8, in [-128, 127]; otherwise 0

  bool operator==(const InputRounding&) const = default;
};

/// The grid of a static mode; exists() says whether there is such a one.
MOQ_HOST_DEVICE inline GridParams static_grid(const InputRounding& input) {
  return grid_of_scale(input.scale, 8, grid_mode(input.mode), input.zero_point);
}

}  // namespace moq::kernels
