#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/cpu/linear_kernels.h"

// Innermost loops of the integer linear kernel with vpdpbusd: unsigned elements of the weight by
// signed 8-bit digits of the input, four columns at a time, summed in 32 bits without saturation.
namespace moq::kernels::cpu::avx512 {

using Digit = std::int8_t;
constexpr int kDigitBits = 8;
constexpr int kDigitsOfExact = 4;
/// Two accumulators each, out of 32 registers.
constexpr int kMaxVectors = 12;
/// A product with few vectors waits for memory, which answers two streams faster than one.
constexpr int kPairVectors = 4;
constexpr std::int64_t kPrefetchBytes = 1024;

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

/// sums[panel][v][row] = Σ element[row] * digit[v] over the columns of some blocks, for kPanels
/// panels of 32 rows, `panel_bytes` apart, and kVectors vectors.
template <int kBits, int kVectors, int kPanels>
void dot(const std::uint8_t* weight, std::int64_t panel_bytes, std::int64_t blocks,
         const Prefetch& prefetch, const Digit* input, std::int32_t* sums) {
  constexpr int kSteps = 8 / kBits;
  constexpr std::int64_t kInputOfBlock = kSteps * kVectors * kStepCols;
  constexpr int kHalves = 2 * kPanels;  // 16 rows each
  // A sum is ready 4 or 5 cycles after it was begun, and every cycle one or two can begin: few
  // vectors need several sums each.
  constexpr int kChains = kVectors * kHalves >= 8 ? 1 : (kVectors * kHalves >= 4 ? 2 : 4);
  const Prefetch ahead = prefetch;
  __m512i sum[kChains][kVectors][kHalves];
#pragma GCC unroll 4
  for (auto& chain : sum) {
#pragma GCC unroll 12
    for (auto& vector : chain) {
#pragma GCC unroll 4
      for (auto& half : vector) {
        half = _mm512_setzero_si512();
      }
    }
  }
  const auto add_block = [&](std::int64_t i, auto& chain) {
    if constexpr (kVectors > kPairVectors) {  // the input of a large batch comes from far, too
      _mm_prefetch(reinterpret_cast<const char*>(input + i * kInputOfBlock + 1024), _MM_HINT_T0);
    }
    if constexpr (kPanels == 1) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead.first + i * ahead.step), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(ahead.second + i * ahead.step), _MM_HINT_T1);
    }
    __m512i bytes[kHalves];
#pragma GCC unroll 4
    for (int half = 0; half < kHalves; ++half) {
      const std::uint8_t* line = weight + half / 2 * panel_bytes + i * kBlockBytes + half % 2 * 64;
      if constexpr (kPanels > 1) {
        _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetchBytes), _MM_HINT_T1);
      }
      bytes[half] = _mm512_load_si512(line);
    }
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      __m512i elements[kHalves];
#pragma GCC unroll 4
      for (int half = 0; half < kHalves; ++half) {
        elements[half] = bytes[half];
        if constexpr (kBits < 8) {
          elements[half] = _mm512_and_si512(_mm512_srli_epi16(bytes[half], step * kBits),
                                            _mm512_set1_epi8((1 << kBits) - 1));
        }
      }
#pragma GCC unroll 12
      for (int v = 0; v < kVectors; ++v) {
        std::int32_t digits;
        std::memcpy(&digits, input + i * kInputOfBlock + (step * kVectors + v) * kStepCols, 4);
        const __m512i broadcast = _mm512_set1_epi32(digits);
#pragma GCC unroll 4
        for (int half = 0; half < kHalves; ++half) {
          chain[v][half] = _mm512_dpbusd_epi32(chain[v][half], elements[half], broadcast);
        }
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
#pragma GCC unroll 4
    for (int half = 0; half < kHalves; ++half) {
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) {
        sum[0][v][half] = _mm512_add_epi32(sum[0][v][half], sum[c][v][half]);
      }
      _mm512_store_si512(sums + (half / 2 * kVectors + v) * kPanelRows + half % 2 * 16,
                         sum[0][v][half]);
    }
  }
}

}  // namespace moq::kernels::cpu::avx512
