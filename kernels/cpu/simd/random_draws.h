#pragma once

#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/cpu/simd/vector.h"

/// Philox in registers: the blocks of philox4x32, many counters at a time, and the draws in them.
namespace moq::kernels::cpu::MOQ_ISA {

/// The stream that a parameter draws from in one step; kernels/fake_quantize.h defines the counter.
struct RandomStream {
  std::uint64_t seed;
  std::uint32_t step;
  std::uint32_t name_hash;
};

/// Blocks that one vector computes, and the vectors that their words fill.
constexpr int kBatchBlocks = kWidth > 1 ? kWidth / 2 : 1;
constexpr int kBatchWords = 4 * kBatchBlocks / kWidth;

/// Batches that are computed side by side: a round is a chain of instructions that wait for each
/// other, and the registers hold this many chains.
constexpr int kBatches = kWidth == 16 ? 4 : kWidth == 8 ? 2 : 1;

/// Elements that the batches have draws for, the vectors that these fill, and those of the words.
constexpr std::int64_t kDrawn = std::int64_t{kPhiloxHalves} * kBatchBlocks * kBatches;
constexpr int kDrawnVectors = static_cast<int>(kDrawn / kWidth);
constexpr int kDrawnWords = kBatchWords * kBatches;

/// What a caller does with itself while words are drawn: nothing.
struct Nothing {
  [[gnu::always_inline]] void operator()(int /*place*/) const {}
};

#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)

/// One counter per 64-bit lane, its words in the lower halves. What a round leaves in the upper
/// halves is never read: the 32 x 32 -> 64 bit product ignores it.
using U64 = std::uint64_t __attribute__((vector_size(4 * kWidth)));

[[gnu::always_inline]] inline U64 multiply_low_halves(U64 a, U64 b) {
#if defined(MOQ_ISA_avx512)
  return bit_cast<U64>(_mm512_mul_epu32(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#else
  return bit_cast<U64>(_mm256_mul_epu32(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#endif
}

/// In each 128 bits: two even (kOdd: odd) 32-bit lanes of a, then two of b.
template <bool kOdd, typename Vector>
[[gnu::always_inline]] inline Vector join_lanes(Vector a, Vector b) {
  constexpr int kOrder = kOdd ? 0xdd : 0x88;
#if defined(MOQ_ISA_avx512)
  return bit_cast<Vector>(_mm512_shuffle_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), kOrder));
#else
  return bit_cast<Vector>(_mm256_shuffle_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), kOrder));
#endif
}

/// A stream's blocks whose numbers agree in their upper 32 bits. These have three of the counter's
/// four words in common, so half of the first two rounds is done once for all of them.
class RandomBlocks {
 public:
  RandomBlocks(const RandomStream& stream, std::uint32_t upper_number) {
    const PhiloxKeys keys = philox_keys(stream.seed);
    const PhiloxStart start = philox_start(upper_number, stream.step, stream.name_hash, keys);
    first2_ = start.first2;
    second0_ = start.second0;
    second2_ = start.second2;
    second3_ = start.second3;
    for (int round = 2; round < kPhiloxRounds; ++round) {
      key0_[round] = keys.word[2 * round];
      key1_[round] = keys.word[2 * round + 1];
    }
  }

  /// Words of kCount batches of blocks from `lower_number` on, in order. Calls between(0) to
  /// between(kDrawnVectors - 1) on the way, in places where the rounds leave execution units idle.
  template <int kCount, typename Between>
  [[gnu::always_inline]] void draw(std::uint32_t lower_number, I32 (&words)[kBatchWords * kCount],
                                   const Between& between) const {
    constexpr int kBetween = kDrawnVectors / (kPhiloxRounds - 2);
    static_assert(kBetween * (kPhiloxRounds - 2) == kDrawnVectors);
    const U64 multiplier0 = U64{} + kPhiloxMultiplier0;
    const U64 multiplier1 = U64{} + kPhiloxMultiplier1;
    U64 word0[kCount];
    U64 word1[kCount];
    U64 word2[kCount];
    U64 word3[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const U64 number = order() + (lower_number + static_cast<std::uint32_t>(i * kBatchBlocks));
      const U64 first = multiply_low_halves(number, multiplier0);
      const U64 second = multiply_low_halves((first >> 32) ^ first2_, multiplier1);
      word0[i] = (second >> 32) ^ second0_;
      word1[i] = second;
      word2[i] = first ^ second2_;
      word3[i] = U64{} + second3_;
    }
#pragma GCC unroll 16
    for (int round = 2; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const U64 product0 = multiply_low_halves(word0[i], multiplier0);
        const U64 product1 = multiply_low_halves(word2[i], multiplier1);
        word0[i] = (product1 >> 32) ^ word1[i] ^ key0_[round];
        word2[i] = (product0 >> 32) ^ word3[i] ^ key1_[round];
        word1[i] = product1;
        word3[i] = product0;
      }
#pragma GCC unroll 8
      for (int i = 0; i < kBetween; ++i) {
        between((round - 2) * kBetween + i);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const U64 pair01 = join_lanes<false>(word0[i], word1[i]);
      const U64 pair23 = join_lanes<false>(word2[i], word3[i]);
      words[2 * i] = bit_cast<I32>(join_lanes<false>(pair01, pair23));
      words[2 * i + 1] = bit_cast<I32>(join_lanes<true>(pair01, pair23));
    }
  }

 private:
  /// Places of blocks in the lanes such that join_lanes, which leaves each 128 bits where they are,
  /// brings their words into order.
  static U64 order() {
#if defined(MOQ_ISA_avx512)
    return U64{0, 4, 1, 5, 2, 6, 3, 7};
#else
    return U64{0, 2, 1, 3};
#endif
  }

  // Parts of words after the first and the second round, and keys of the later ones. In 64 bits:
  // broadcast to lanes straight from here.
  std::uint64_t first2_;
  std::uint64_t second0_;
  std::uint64_t second2_;
  std::uint64_t second3_;
  std::uint64_t key0_[kPhiloxRounds];
  std::uint64_t key1_[kPhiloxRounds];
};

#else

class RandomBlocks {
 public:
  RandomBlocks(const RandomStream& stream, std::uint32_t upper_number)
      : stream_(stream), upper_number_(upper_number) {}

  template <int kCount, typename Between>
  void draw(std::uint32_t lower_number, I32 (&words)[kBatchWords * kCount],
            const Between& between) const {
    const PhiloxBlock block =
        philox4x32({{lower_number, upper_number_, stream_.step, stream_.name_hash}}, stream_.seed);
    std::memcpy(words, block.word, sizeof(block.word));
    for (int i = 0; i < kDrawnVectors; ++i) {
      between(i);
    }
  }

 private:
  RandomStream stream_;
  std::uint32_t upper_number_;
};

#endif

/// Draws of the i-th vector of elements, in units of 2^-16, from their blocks' words.
[[gnu::always_inline]] inline I32 draws_of(const I32* words, int i) {
#if defined(MOQ_ISA_avx512)
  const auto both = bit_cast<__m512i>(words[i / 2]);
  const __m256i halves =
      i % 2 == 0 ? _mm512_castsi512_si256(both) : _mm512_extracti64x4_epi64(both, 1);
  return bit_cast<I32>(_mm512_cvtepu16_epi32(halves));
#elif defined(MOQ_ISA_avx2)
  const auto both = bit_cast<__m256i>(words[i / 2]);
  const __m128i halves =
      i % 2 == 0 ? _mm256_castsi256_si128(both) : _mm256_extracti128_si256(both, 1);
  return bit_cast<I32>(_mm256_cvtepu16_epi32(halves));
#else
  return static_cast<I32>((static_cast<U32>(words[i / 2]) >> (i % 2 * 16)) & 0xffffU);
#endif
}

/// True if the blocks [first, end) do not all agree in the upper 32 bits of their numbers.
inline bool straddles(std::uint64_t first, std::uint64_t end) {
  return first >> 32 != (end - 1) >> 32;
}

/// The draws of a parameter's elements, which follow each other in the order of their numbers.
class RandomDraws {
 public:
  explicit RandomDraws(const RandomStream& stream) : stream_(stream), blocks_(stream, 0) {}

  /// Blocks that have `number` among them.
  const RandomBlocks& blocks_at(std::uint64_t number) {
    const auto upper_number = static_cast<std::uint32_t>(number >> 32);
    if (upper_number != upper_number_) {
      upper_number_ = upper_number;
      blocks_ = RandomBlocks(stream_, upper_number);
    }
    return blocks_;
  }

  /// Room that draw() needs for `size` elements: whole batches, at any alignment.
  static constexpr std::int64_t capacity(std::int64_t size) {
    return size + kPhiloxHalves * (kBatchBlocks + 1);
  }

  /// Draws of the elements [first, first + size) in units of 2^-16, written to `buffer` (with room
  /// for capacity(size)); returns where the first element's draw is.
  const std::uint16_t* draw(std::int64_t first, std::int64_t size, std::uint16_t* buffer) {
    constexpr auto kHalves = static_cast<std::uint64_t>(kPhiloxHalves);
    const auto first_half = static_cast<std::uint64_t>(first);
    const std::uint64_t end =
        (first_half + static_cast<std::uint64_t>(size) + kHalves - 1) / kHalves;
    std::uint64_t number = first_half / kHalves;
    std::uint16_t* target = buffer;
    while (number < end) {
      const std::uint64_t next_upper = ((number >> 32) + 1) << 32;
      const std::uint64_t end_here = end < next_upper ? end : next_upper;
      const RandomBlocks& blocks = blocks_at(number);
      for (; number + kBatches * kBatchBlocks <= end_here; number += kBatches * kBatchBlocks) {
        target = put<kBatches>(blocks, number, target);
      }
      for (; number < end_here; number += kBatchBlocks) {
        target = put<1>(blocks, number, target);
      }
      target -= kHalves * (number - end_here);  // the last batch may have passed the end
      number = end_here;
    }
    return buffer + first_half % kHalves;
  }

 private:
  template <int kCount>
  static std::uint16_t* put(const RandomBlocks& blocks, std::uint64_t number,
                            std::uint16_t* target) {
    I32 words[kBatchWords * kCount];
    blocks.draw<kCount>(static_cast<std::uint32_t>(number), words, Nothing());
    std::memcpy(target, words, sizeof(words));
    return target + std::int64_t{kPhiloxHalves} * kBatchBlocks * kCount;
  }

  RandomStream stream_;
  std::uint32_t upper_number_ = 0;
  RandomBlocks blocks_;
};

}  // namespace moq::kernels::cpu::MOQ_ISA
