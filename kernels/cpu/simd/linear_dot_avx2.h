#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/cpu/simd/linear_dot_wide.h"

// Innermost loop of the integer linear kernel with vpmaddwd: the bytes of even and of odd columns
// become 16-bit integers by a mask and a shift, and pairs of them meet pairs of 16-bit digits.
namespace moq::kernels::cpu::avx2 {

/// Four accumulators each, out of 16 registers.
constexpr int kMaxVectors = 3;
constexpr int kPairVectors = 0;  // panels are multiplied one by one

/// sums[v][row] = Σ element[row] * digit[v] over the columns of some blocks, for the 32 rows of one
/// panel and kVectors vectors.
template <int kBits, int kVectors, int kPanels>
void dot(const std::uint8_t* weight, std::int64_t /*panel_bytes*/, std::int64_t blocks,
         const Prefetch& prefetch, const Digit* input, std::int32_t* sums) {
  static_assert(kPanels == 1);
  constexpr int kSteps = 8 / kBits;
  constexpr int kQuarters = 4;  // of a block: 8 rows each
  const __m256i even_bytes = _mm256_set1_epi16(0xff);
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << kBits) - 1));
  __m256i sum[kVectors][kQuarters];
#pragma GCC unroll 3
  for (auto& vector : sum) {
#pragma GCC unroll 4
    for (auto& quarter : vector) {
      quarter = _mm256_setzero_si256();
    }
  }
  for (std::int64_t i = 0; i < blocks; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(prefetch.first + i * prefetch.step), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(prefetch.second + i * prefetch.step), _MM_HINT_T1);
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 4
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        __m256i elements =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(weight + quarter * 32));
        if constexpr (kBits < 8) {
          elements = _mm256_and_si256(_mm256_srli_epi16(elements, step * kBits), mask);
        }
        const __m256i even = _mm256_and_si256(elements, even_bytes);
        const __m256i odd = _mm256_srli_epi16(elements, 8);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          std::int32_t digits[2];
          std::memcpy(digits, input + (step * kVectors + v) * kStepCols, 8);
          sum[v][quarter] = _mm256_add_epi32(
              sum[v][quarter],
              _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_set1_epi32(digits[0])),
                               _mm256_madd_epi16(odd, _mm256_set1_epi32(digits[1]))));
        }
      }
    }
    weight += kBlockBytes;
    input += kSteps * kVectors * kStepCols;
  }
#pragma GCC unroll 3
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + v * kPanelRows + quarter * 8),
                         sum[v][quarter]);
    }
  }
}

}  // namespace moq::kernels::cpu::avx2
