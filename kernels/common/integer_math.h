#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

namespace moq {

/// a / b, rounded up; a >= 0, b > 0.
MOQ_HOST_DEVICE constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

/// The least multiple of b that is not below a; a >= 0, b > 0.
MOQ_HOST_DEVICE constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return divide_up(a, b) * b;
}

}  // namespace moq
