#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/cpu/linear_layout.h"

// Innermost loops of the integer linear kernel with vpdpbusd: unsigned elements of the weight by
// signed 8-bit digits of the input, four columns at a time, summed in 32 bits without saturation.
namespace moq::kernels::cpu::avx512 {

using Digit = std::int8_t;
constexpr int kDigitBits = 8;
constexpr int kDigitsOfExact = 4;
/// Two accumulators each, out of 32 registers.
constexpr int kMaxVectors = 12;

/// Writes 16 integers as kDigits balanced digits each: for each of the first `steps` groups of four
/// columns [kDigits, 4], `stride` digits apart.
template <int kDigits>
void write_digits(const std::int32_t* x, std::int64_t steps, std::int64_t stride, Digit* output) {
  const __m512i integers = _mm512_loadu_si512(x);
  alignas(64) Digit digits[16 * kDigits];
  if constexpr (kDigits == 1) {
    _mm_store_si128(reinterpret_cast<__m128i*>(digits), _mm512_cvtepi32_epi8(integers));
  } else {
    // Adding 128 to each of the three low bytes carries where a digit becomes negative; flipping
    // their top bits takes the 128 away again.
    const __m512i bias = _mm512_set1_epi32(0x00808080);
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(integers, bias), bias);
    const __m512i by_digit =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    _mm512_store_si512(digits, _mm512_shuffle_epi8(bytes, by_digit));
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    std::memcpy(output + step * stride, digits + step * 4 * kDigits, 4 * kDigits);
  }
}

/// sums[v][row] = Σ element[row] * digit[v] over the columns of some blocks, for the 32 rows of a
/// panel and kVectors vectors.
template <int kBits, int kVectors>
void dot(const std::uint8_t* weight, std::int64_t blocks, const Digit* input, std::int32_t* sums) {
  constexpr int kSteps = 8 / kBits;
  constexpr std::int64_t kInputOfBlock = kSteps * kVectors * kStepCols;
  // A sum is ready 4 or 5 cycles after it was begun, and every cycle one or two can begin: few
  // vectors need several sums each.
  constexpr int kChains = kVectors >= 4 ? 1 : (kVectors >= 2 ? 2 : 4);
  // Hardware prefetchers stop at page boundaries and keep too little under way on virtual machines.
  constexpr std::int64_t kPrefetchBytes = 4096;
  __m512i sum[kChains][kVectors][2];
#pragma GCC unroll 4
  for (auto& chain : sum) {
#pragma GCC unroll 12
    for (auto& vector : chain) {
      vector[0] = vector[1] = _mm512_setzero_si512();
    }
  }
  const auto add_block = [&](std::int64_t i, auto& chain) {
    const std::uint8_t* block = weight + i * kBlockBytes;
    _mm_prefetch(reinterpret_cast<const char*>(block + kPrefetchBytes), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(block + kPrefetchBytes + 64), _MM_HINT_T0);
    const __m512i bytes[2] = {_mm512_load_si512(block), _mm512_load_si512(block + 64)};
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      __m512i elements[2] = {bytes[0], bytes[1]};
      if constexpr (kBits < 8) {
        const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
        elements[0] = _mm512_and_si512(_mm512_srli_epi16(bytes[0], step * kBits), mask);
        elements[1] = _mm512_and_si512(_mm512_srli_epi16(bytes[1], step * kBits), mask);
      }
#pragma GCC unroll 12
      for (int v = 0; v < kVectors; ++v) {
        std::int32_t digits;
        std::memcpy(&digits, input + i * kInputOfBlock + (step * kVectors + v) * kStepCols, 4);
        const __m512i broadcast = _mm512_set1_epi32(digits);
        chain[v][0] = _mm512_dpbusd_epi32(chain[v][0], elements[0], broadcast);
        chain[v][1] = _mm512_dpbusd_epi32(chain[v][1], elements[1], broadcast);
      }
    }
  };
  std::int64_t i = 0;
  for (; i + kChains <= blocks; i += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      add_block(i + c, sum[c]);
    }
  }
  for (; i < blocks; ++i) {
    add_block(i, sum[0]);
  }
#pragma GCC unroll 12
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) {
        sum[0][v][half] = _mm512_add_epi32(sum[0][v][half], sum[c][v][half]);
      }
      _mm512_store_si512(sums + v * kPanelRows + half * 16, sum[0][v][half]);
    }
  }
}

}  // namespace moq::kernels::cpu::avx512
