#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/common/half.h"
#include "kernels/cuda/warp.h"

/// Neighbouring elements that a thread loads and stores at once, and their conversions by the
/// processor's own instructions (the numbers of half.h, other NaNs).
namespace moq::kernels::cuda {

constexpr int kVectorBytes = 16;

/// 16-bit elements lie in pairs, as the processor converts them.
template <typename Element, int kWidth>
struct alignas(std::min<std::size_t>(kWidth * sizeof(Element), kVectorBytes)) Vector {
  static constexpr bool kPairs = sizeof(Element) == 2 && kWidth % 2 == 0;
  static constexpr int kUnits = kPairs ? kWidth / 2 : kWidth;
  std::conditional_t<kPairs, std::uint32_t, Element> unit[kUnits];
};

template <int kWidth>
using Numbers = Vector<float, kWidth>;

// A pair, and a single element, of each dtype.
template <typename Element>
__device__ float2 numbers_of_pair(std::uint32_t pair);
template <>
__device__ inline float2 numbers_of_pair<Float16>(std::uint32_t pair) {
  float2 numbers;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; "
      "cvt.f32.f16 %1, high; }"
      : "=f"(numbers.x), "=f"(numbers.y)
      : "r"(pair));
  return numbers;
}
template <>
__device__ inline float2 numbers_of_pair<BFloat16>(std::uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000U)};
}

template <typename Element>
__device__ std::uint32_t rounded_pair(float low, float high);
template <>
__device__ inline std::uint32_t rounded_pair<Float16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ inline std::uint32_t rounded_pair<BFloat16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline float number_of(float element) {
  return element;
}
__device__ inline float number_of(Float16 element) {
  return __half2float(__ushort_as_half(element.bits));
}
__device__ inline float number_of(BFloat16 element) {
  return bfloat16_to_float(element.bits);
}
__device__ inline void round_to_element(float number, float& element) {
  element = number;
}
__device__ inline void round_to_element(float number, Float16& element) {
  element = {__half_as_ushort(__float2half_rn(number))};
}
__device__ inline void round_to_element(float number, BFloat16& element) {
  element = {__bfloat16_as_ushort(__float2bfloat16_rn(number))};
}

template <typename Element, int kWidth>
__device__ Numbers<kWidth> numbers_of(const Vector<Element, kWidth>& vector) {
  Numbers<kWidth> numbers;
#pragma unroll
  for (int i = 0; i < vector.kUnits; ++i) {
    if constexpr (Vector<Element, kWidth>::kPairs) {
      const float2 pair = numbers_of_pair<Element>(vector.unit[i]);
      numbers.unit[2 * i] = pair.x;
      numbers.unit[2 * i + 1] = pair.y;
    } else {
      numbers.unit[i] = number_of(vector.unit[i]);
    }
  }
  return numbers;
}

template <typename Element, int kWidth>
__device__ Vector<Element, kWidth> rounded(const Numbers<kWidth>& numbers) {
  Vector<Element, kWidth> vector;
#pragma unroll
  for (int i = 0; i < vector.kUnits; ++i) {
    if constexpr (Vector<Element, kWidth>::kPairs) {
      vector.unit[i] = rounded_pair<Element>(numbers.unit[2 * i], numbers.unit[2 * i + 1]);
    } else {
      round_to_element(numbers.unit[i], vector.unit[i]);
    }
  }
  return vector;
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
