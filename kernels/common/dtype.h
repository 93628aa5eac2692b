#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/host_device.h"

namespace moq {

/// Element types that cross a kernel contract.
enum class DType : std::uint8_t { kFloat32, kFloat16, kBFloat16, kInt8, kInt16, kInt32 };

MOQ_HOST_DEVICE constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16:
      return 2;
    case DType::kInt8:
      return 1;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt8:
      return "int8";
    case DType::kInt16:
      return "int16";
    case DType::kInt32:
      return "int32";
  }
  return "unknown";
}

}  // namespace moq
