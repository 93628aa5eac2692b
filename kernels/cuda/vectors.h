#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "kernels/common/half.h"

/// Neighbouring elements that a thread loads and stores at once, and the conversions of half.h by
/// the processor's own instructions (same numbers, other NaNs).
namespace moq::kernels::cuda {

constexpr int kWarpSize = 32;
constexpr int kVectorBytes = 16;

template <typename Element, int kWidth>
struct alignas(std::min<std::size_t>(kWidth * sizeof(Element), kVectorBytes)) Vector {
  Element element[kWidth];
};

__device__ inline float number(float element) {
  return element;
}
__device__ inline float number(Float16 element) {
  return __half2float(__ushort_as_half(element.bits));
}
__device__ inline float number(BFloat16 element) {
  return bfloat16_to_float(element.bits);
}

template <typename Element>
__device__ Element rounded(float value);
template <>
__device__ inline float rounded<float>(float value) {
  return value;
}
template <>
__device__ inline Float16 rounded<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ inline BFloat16 rounded<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

template <int kWidth, typename Element>
__device__ Vector<Element, kWidth> load_vector(const Element* source) {
  return *reinterpret_cast<const Vector<Element, kWidth>*>(source);
}
template <typename Element, int kWidth>
__device__ void store_vector(Element* target, const Vector<Element, kWidth>& vector) {
  *reinterpret_cast<Vector<Element, kWidth>*>(target) = vector;
}

/// Whether vectors of 16 bytes can be accessed at an address, or from one row to the next; a null
/// pointer is no obstacle.
inline bool suits_vectors(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;
}
inline bool suits_vectors(std::int64_t elements, std::size_t element_bytes) {
  return elements * static_cast<std::int64_t>(element_bytes) % kVectorBytes == 0;
}

}  // namespace moq::kernels::cuda
