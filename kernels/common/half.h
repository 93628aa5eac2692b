#pragma once

#include <bit>
#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/common/host_device.h"

/// Conversions between float32 and the two 16-bit formats, rounding to nearest even.
/// Written on bit patterns so that host and device compile the same arithmetic, which is also that
/// of the processors' conversion instructions: a NaN stays a NaN, made quiet, with the leading bits
/// of its payload.
namespace moq {

/// Storage of one element: the bits and nothing else. Kernels compute in float32.
struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

MOQ_HOST_DEVICE inline float bfloat16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

MOQ_HOST_DEVICE inline std::uint16_t float_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) {
    return static_cast<std::uint16_t>((bits >> 16) | 0x0040U);  // a NaN stays a (quiet) NaN
  }
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

MOQ_HOST_DEVICE inline float float16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
  const std::uint32_t magnitude = bits & 0x7fffU;
  if (magnitude > 0x7c00U) {
    return std::bit_cast<float>(sign | 0x7fc00000U | (magnitude << 13));
  }
  if (magnitude == 0x7c00U) {
    return std::bit_cast<float>(sign | 0x7f800000U);
  }
  if (magnitude >= 0x0400U) {  // normal: rebias the exponent from 15 to 127
    return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000U));
  }
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24F;  // exact
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(subnormal));
}

MOQ_HOST_DEVICE inline std::uint16_t float_to_float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    return static_cast<std::uint16_t>(sign | 0x7e00U | ((magnitude >> 13) & 0x3ffU));
  }
  if (magnitude >= 0x477ff000U) {  // 65520 and above round to infinity
    return sign | 0x7c00U;
  }
  if (magnitude >= 0x38800000U) {  // normal in float16
    const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
    return sign | static_cast<std::uint16_t>((rounded - 0x38000000U) >> 13);
  }
  // Adding 0.5 aligns the last kept bit (2^-24) with the last bit of the float32 mantissa, so the
  // addition itself rounds to nearest even.
  const float aligned = std::bit_cast<float>(magnitude) + 0.5F;
  return sign | static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(aligned) - 0x3f000000U);
}

MOQ_HOST_DEVICE inline float to_float(float value) {
  return value;
}
MOQ_HOST_DEVICE inline float to_float(Float16 value) {
  return float16_to_float(value.bits);
}
MOQ_HOST_DEVICE inline float to_float(BFloat16 value) {
  return bfloat16_to_float(value.bits);
}

/// Stores `value` as the element type that `output` points to, rounded once.
MOQ_HOST_DEVICE inline void store_float(float* output, float value) {
  *output = value;
}
MOQ_HOST_DEVICE inline void store_float(Float16* output, float value) {
  output->bits = float_to_float16(value);
}
MOQ_HOST_DEVICE inline void store_float(BFloat16* output, float value) {
  output->bits = float_to_bfloat16(value);
}

/// `value` rounded to the nearest representable number of `dtype` (a floating-point type).
MOQ_HOST_DEVICE inline float round_to(float value, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return float16_to_float(float_to_float16(value));
    case DType::kBFloat16:
      return bfloat16_to_float(float_to_bfloat16(value));
    default:
      return value;
  }
}

}  // namespace moq
