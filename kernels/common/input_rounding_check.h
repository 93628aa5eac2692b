#pragma once

#include "kernels/common/check.h"
#include "kernels/input_rounding.h"

namespace moq::kernels {

/// @throws moq::Error naming `where`, for a static mode without a grid, and for a scale or a zero
///         point that the mode has not.
inline void check(const char* where, const InputRounding& input) {
  const bool has_scale = is_static(input.mode);
  MOQ_CHECK(!has_scale || exists(grid_of_scale(input.scale, 8)), where,
            ": input_scale must be finite and >= ", min_scale(DType::kFloat32), ", got ",
            input.scale);
  MOQ_CHECK(has_scale || input.scale == 0.0F, where,
            ": input_scale must come with a static INT8 mode, got ", input.scale, " and ",
            name_of(input.mode));
  MOQ_CHECK(input.mode != InputMode::kStaticAsymmetricInt8 || exists(static_grid(input)), where,
            ": input_zero_point must lie in [-128, 127], got ", input.zero_point);
  MOQ_CHECK(input.mode == InputMode::kStaticAsymmetricInt8 || input.zero_point == 0, where,
            ": input_zero_point must come with static_asymmetric_int8, got ", input.zero_point,
            " and ", name_of(input.mode));
}

}  // namespace moq::kernels
