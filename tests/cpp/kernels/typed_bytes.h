#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/common/half.h"
#include "kernels/common/visit.h"

/// Numbers as the bytes of a dtype, and back: what tests of kernels hand over and read.
namespace moq::kernels::testing {

inline std::vector<std::byte> to_bytes(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  if (dtype == DType::kInt8) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      // What is no code (a NaN) becomes the largest one.
      const float code = values[i] == values[i] ? values[i] : 127.0F;
      bytes[i] = static_cast<std::byte>(static_cast<std::int8_t>(code));
    }
    return bytes;
  }
  visit_float(dtype, [&]<typename Element>(Element) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      store_float(reinterpret_cast<Element*>(bytes.data()) + i, values[i]);
    }
  });
  return bytes;
}

inline std::vector<float> from_bytes(const std::vector<std::byte>& bytes, DType dtype) {
  std::vector<float> values(bytes.size() / size_of(dtype));
  if (dtype == DType::kInt8) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(static_cast<std::int8_t>(bytes[i]));
    }
    return values;
  }
  visit_float(dtype, [&]<typename Element>(Element) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = to_float(reinterpret_cast<const Element*>(bytes.data())[i]);
    }
  });
  return values;
}

/// The numbers that a dtype makes of these.
inline std::vector<float> rounded(const std::vector<float>& values, DType dtype) {
  return from_bytes(to_bytes(values, dtype), dtype);
}

/// The largest relative error of a number that was rounded to a dtype, and half the step of the
/// smallest ones.
struct RoundingError {
  double relative;
  double absolute;
};
inline RoundingError rounding_error(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {0x1p-11, 0x1p-25};
    case DType::kBFloat16:
      return {0x1p-8, 0x1p-134};
    default:
      return {0x1p-24, 0x1p-150};
  }
}

/// Rows of a matrix with `padding` elements, all -7, behind each, and `offset` before the first.
inline std::vector<float> spread(const std::vector<float>& values, std::int64_t rows,
                                 std::int64_t cols, std::int64_t padding, std::int64_t offset) {
  std::vector<float> wide(static_cast<std::size_t>(offset + rows * (cols + padding)), -7.0F);
  for (std::int64_t i = 0; i < rows * cols; ++i) {
    wide[static_cast<std::size_t>(offset + i / cols * (cols + padding) + i % cols)] =
        values[static_cast<std::size_t>(i)];
  }
  return wide;
}

}  // namespace moq::kernels::testing
