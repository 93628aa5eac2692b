#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/common/half.h"
#include "kernels/common/visit.h"

/// Numbers as the bytes of a dtype, and back: what tests of GPU kernels upload and read.
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

}  // namespace moq::kernels::testing
