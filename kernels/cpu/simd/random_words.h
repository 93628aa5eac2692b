#pragma once

#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/cpu/simd/vector.h"

/// Runs of Philox words in registers: the same words as philox4x32, many counters at a time.
namespace moq::kernels::cpu::MOQ_ISA {

/// The stream that a parameter draws from in one step; kernels/fake_quantize.h defines the counter.
struct RandomStream {
  std::uint64_t seed;
  std::uint32_t step;
  std::uint32_t name_hash;
};

[[gnu::always_inline]] inline PhiloxBlock random_block(const RandomStream& stream,
                                                       std::uint64_t block) {
  return philox4x32({{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                      stream.step, stream.name_hash}},
                    stream.seed);
}

/// Counters that random_blocks computes together.
constexpr int kRandomBlocks = kWidth > 1 ? kWidth / 2 : 1;

/// Words of the blocks [first, first + kRandomBlocks), four a block, in order.
inline void random_blocks(const RandomStream& stream, std::uint64_t first, std::uint32_t* words) {
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
  // One counter per 64-bit lane, its words in the lower halves. What a round leaves in the upper
  // halves is never read: the 32 x 32 -> 64 bit product ignores it.
  using U64 = std::uint64_t __attribute__((vector_size(8 * kRandomBlocks)));
  const auto multiply = [](U64 a, std::uint32_t b) {
#if defined(MOQ_ISA_avx512)
    return bit_cast<U64>(_mm512_mul_epu32(bit_cast<__m512i>(a), _mm512_set1_epi64(b)));
#else
    return bit_cast<U64>(_mm256_mul_epu32(bit_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#endif
  };
#if defined(MOQ_ISA_avx512)
  const U64 counter = U64{0, 1, 2, 3, 4, 5, 6, 7} + first;
#else
  const U64 counter = U64{0, 1, 2, 3} + first;
#endif
  U64 word0 = counter;
  U64 word1 = counter >> 32;
  U64 word2 = U64{} + stream.step;
  U64 word3 = U64{} + stream.name_hash;
  auto key0 = static_cast<std::uint32_t>(stream.seed);
  auto key1 = static_cast<std::uint32_t>(stream.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const U64 product0 = multiply(word0, kPhiloxMultiplier0);
    const U64 product1 = multiply(word2, kPhiloxMultiplier1);
    word0 = (product1 >> 32) ^ word1 ^ key0;
    word2 = (product0 >> 32) ^ word3 ^ key1;
    word1 = product1;
    word3 = product0;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  const U64 low = (word0 & 0xffffffffU) | (word1 << 32);
  const U64 high = (word2 & 0xffffffffU) | (word3 << 32);
#if defined(MOQ_ISA_avx512)
  const U64 first_half = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
  const U64 second_half = __builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  const U64 first_half = __builtin_shufflevector(low, high, 0, 4, 1, 5);
  const U64 second_half = __builtin_shufflevector(low, high, 2, 6, 3, 7);
#endif
  std::memcpy(words, &first_half, sizeof(first_half));
  std::memcpy(words + 2 * kRandomBlocks, &second_half, sizeof(second_half));
#else
  const PhiloxBlock block = random_block(stream, first);
  std::memcpy(words, block.word, sizeof(block.word));
#endif
}

/// Room that random_words needs for `size` elements: whole batches of blocks, at any alignment.
constexpr std::int64_t random_words_capacity(std::int64_t size) {
  return size + 4 * (kRandomBlocks + 1);
}

/// Words of the elements [first, first + size) of a parameter, written to `buffer` (with room for
/// random_words_capacity(size)); returns where the first element's word is.
inline const std::uint32_t* random_words(const RandomStream& stream, std::int64_t first,
                                         std::int64_t size, std::uint32_t* buffer) {
  const auto first_word = static_cast<std::uint64_t>(first);
  const auto end_block = (first_word + static_cast<std::uint64_t>(size) + 3) / 4;
  std::uint32_t* words = buffer;
  for (std::uint64_t block = first_word / 4; block < end_block; block += kRandomBlocks) {
    random_blocks(stream, block, words);
    words += 4 * kRandomBlocks;
  }
  return buffer + first_word % 4;
}

}  // namespace moq::kernels::cpu::MOQ_ISA
