#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/common/half.h"

#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
#include <immintrin.h>
#endif

/// After the parameters of a lambda: inlined wherever it is called.
#define MOQ_INLINE_LAMBDA __attribute__((always_inline))

/// One vector register of the instruction set that the including file is compiled for, so that a
/// kernel is written once. Arithmetic, comparison, bit operations and `mask ? a : b` are the
/// compiler's own operators, which `float` and `std::int32_t` have too: the scalar build is the
/// same text at width 1. Named functions exist only where C++ has no operator.
namespace moq::kernels::cpu::MOQ_ISA {

#if defined(MOQ_ISA_avx512)
constexpr int kWidth = 16;
#elif defined(MOQ_ISA_avx2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 1;
#endif

#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
using F32 = float __attribute__((vector_size(4 * kWidth)));
using I32 = std::int32_t __attribute__((vector_size(4 * kWidth)));
using U32 = std::uint32_t __attribute__((vector_size(4 * kWidth)));
using U16 = std::uint16_t __attribute__((vector_size(2 * kWidth)));
using I16 = std::int16_t __attribute__((vector_size(2 * kWidth)));
using I8 = std::int8_t __attribute__((vector_size(kWidth)));
#else
using F32 = float;
using I32 = std::int32_t;
using U32 = std::uint32_t;
using U16 = std::uint16_t;
using I16 = std::int16_t;
using I8 = std::int8_t;
#endif

/// The same bits as another type of the same size.
template <typename To, typename From>
[[gnu::always_inline]] inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

/// Each element converted to the other type's element (float to integer: towards zero).
template <typename To, typename From>
[[gnu::always_inline]] inline To convert(From from) {
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
  return __builtin_convertvector(from, To);
#else
  return static_cast<To>(from);
#endif
}

[[gnu::always_inline]] inline F32 broadcast(float value) {
  return value - F32{};
}
[[gnu::always_inline]] inline I32 broadcast(std::int32_t value) {
  return value - I32{};
}

template <typename Vector>
[[gnu::always_inline]] inline Vector load_bits(const void* input) {
  Vector vector;
  std::memcpy(&vector, input, sizeof(vector));
  return vector;
}

[[gnu::always_inline]] inline F32 load(const float* input) {
  return load_bits<F32>(input);
}

[[gnu::always_inline]] inline F32 load(const BFloat16* input) {
  return bit_cast<F32>(convert<U32>(load_bits<U16>(input)) << 16);
}

[[gnu::always_inline]] inline F32 load(const Float16* input) {
#if defined(MOQ_ISA_avx512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(input)));
#elif defined(MOQ_ISA_avx2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(input)));
#else
  return to_float(*input);
#endif
}

/// The bits to store for each element type; 16-bit types are rounded to nearest even as half.h
/// does.
[[gnu::always_inline]] inline F32 narrow(F32 value, const float*) {
  return value;
}

[[gnu::always_inline]] inline U16 narrow(F32 value, const BFloat16*) {
  const U32 bits = bit_cast<U32>(value);
  const U32 rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40U;
  return convert<U16>((bits & 0x7fffffffU) > 0x7f800000U ? quiet : rounded);
}

[[gnu::always_inline]] inline U16 narrow(F32 value, const Float16*) {
#if defined(MOQ_ISA_avx512)
  return bit_cast<U16>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(MOQ_ISA_avx2)
  return bit_cast<U16>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  return float_to_float16(value);
#endif
}

/// Integers in [-128, 127] and [-32768, 32767] as codes of that size.
[[gnu::always_inline]] inline void store(std::int8_t* output, I32 value) {
#if defined(MOQ_ISA_avx512)
  const I8 codes = bit_cast<I8>(_mm512_cvtepi32_epi8(bit_cast<__m512i>(value)));
#elif defined(MOQ_ISA_avx2)
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(bit_cast<__m256i>(value)),
                                        _mm256_extracti128_si256(bit_cast<__m256i>(value), 1));
  const std::int64_t codes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
#else
  const auto codes = static_cast<std::int8_t>(value);
#endif
  std::memcpy(output, &codes, sizeof(codes));
}

[[gnu::always_inline]] inline void store(std::int16_t* output, I32 value) {
#if defined(MOQ_ISA_avx512)
  const I16 codes = bit_cast<I16>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(value)));
#elif defined(MOQ_ISA_avx2)
  const __m128i codes = _mm_packs_epi32(_mm256_castsi256_si128(bit_cast<__m256i>(value)),
                                        _mm256_extracti128_si256(bit_cast<__m256i>(value), 1));
#else
  const auto codes = static_cast<std::int16_t>(value);
#endif
  std::memcpy(output, &codes, sizeof(codes));
}

template <typename Element>
[[gnu::always_inline]] inline void store(Element* output, F32 value) {
  const auto bits = narrow(value, output);
  std::memcpy(output, &bits, sizeof(bits));
}

/// Stores past the caches: for results larger than them, a store that does not read the line first.
/// `output` is aligned to the bytes of one vector of its element type; fence_streams() orders it.
template <typename Element>
[[gnu::always_inline]] inline void stream(Element* output, F32 value) {
  const auto bits = narrow(value, output);
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
  if constexpr (sizeof(bits) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(output), bit_cast<__m512i>(bits));
  } else if constexpr (sizeof(bits) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(output), bit_cast<__m256i>(bits));
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(output), bit_cast<__m128i>(bits));
  }
#else
  std::memcpy(output, &bits, sizeof(bits));
#endif
}

inline void fence_streams() {
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
  _mm_sfence();
#endif
}

template <typename Vector>
[[gnu::always_inline]] inline Vector maximum(Vector a, Vector b) {
  return a > b ? a : b;
}

template <typename Vector>
[[gnu::always_inline]] inline Vector minimum(Vector a, Vector b) {
  return a < b ? a : b;
}

#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
// One instruction with the same answer for NaN and zeros, which compilers do not always find.
[[gnu::always_inline]] inline F32 maximum(F32 a, F32 b) {
#if defined(MOQ_ISA_avx512)
  return _mm512_max_ps(a, b);
#else
  return _mm256_max_ps(a, b);
#endif
}

[[gnu::always_inline]] inline F32 minimum(F32 a, F32 b) {
#if defined(MOQ_ISA_avx512)
  return _mm512_min_ps(a, b);
#else
  return _mm256_min_ps(a, b);
#endif
}
#endif

[[gnu::always_inline]] inline F32 absolute(F32 value) {
  return bit_cast<F32>(bit_cast<I32>(value) & 0x7fffffff);
}

/// a * b + c, rounded once where the instruction set can (avx2, avx512), twice where it cannot.
[[gnu::always_inline]] inline F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(MOQ_ISA_avx512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(MOQ_ISA_avx2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

/// Nearest integer, half to even.
[[gnu::always_inline]] inline F32 round_nearest(F32 value) {
#if defined(MOQ_ISA_avx512)
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(MOQ_ISA_avx2)
  return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return std::rint(value);
#endif
}

[[gnu::always_inline]] inline F32 round_down(F32 value) {
#if defined(MOQ_ISA_avx512)
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(MOQ_ISA_avx2)
  return _mm256_round_ps(value, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  return std::floor(value);
#endif
}

[[gnu::always_inline]] inline F32 round_to_zero(F32 value) {
#if defined(MOQ_ISA_avx512)
  return _mm512_roundscale_ps(value, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#elif defined(MOQ_ISA_avx2)
  return _mm256_round_ps(value, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
  return std::trunc(value);
#endif
}

inline std::int32_t reduce_max(I32 value) {
#if defined(MOQ_ISA_avx512)
  return _mm512_reduce_max_epi32(bit_cast<__m512i>(value));
#elif defined(MOQ_ISA_avx2)
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(bit_cast<__m256i>(value)),
                               _mm256_extracti128_si256(bit_cast<__m256i>(value), 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(1, 0, 3, 2)));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(half);
#else
  return value;
#endif
}

inline std::int32_t reduce_min(I32 value) {
  return ~reduce_max(~value);
}

}  // namespace moq::kernels::cpu::MOQ_ISA
