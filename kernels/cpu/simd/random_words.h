#pragma once

#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/cpu/simd/vector.h"

/// Philox words in registers: the same words as philox4x32, many counters at a time.
namespace moq::kernels::cpu::MOQ_ISA {

/// The stream that a parameter draws from in one step; kernels/fake_quantize.h defines the counter.
struct RandomStream {
  std::uint64_t seed;
  std::uint32_t step;
  std::uint32_t name_hash;
};

/// Blocks that one vector computes, and the vectors that their words fill.
constexpr int kBatchBlocks = kWidth > 1 ? kWidth / 2 : 1;
constexpr int kBatchVectors = 4 * kBatchBlocks / kWidth;

/// Batches that are computed side by side: a round is a chain of instructions that wait for each
/// other, and the registers hold this many chains.
constexpr int kBatches = kWidth == 16 ? 4 : kWidth == 8 ? 2 : 1;

/// Elements whose words the batches are, and the vectors that these fill.
constexpr std::int64_t kDrawn = std::int64_t{4} * kBatchBlocks * kBatches;
constexpr int kDrawnVectors = kBatchVectors * kBatches;

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
    auto key0 = static_cast<std::uint32_t>(stream.seed);
    auto key1 = static_cast<std::uint32_t>(stream.seed >> 32);
    const std::uint64_t first_product = std::uint64_t{kPhiloxMultiplier1} * stream.step;
    const std::uint32_t word0 =
        static_cast<std::uint32_t>(first_product >> 32) ^ upper_number ^ key0;
    const std::uint64_t second_product = std::uint64_t{kPhiloxMultiplier0} * word0;
    first2_ = stream.name_hash ^ key1;
    for (int round = 1; round < kPhiloxRounds; ++round) {
      key0 += kPhiloxWeyl0;
      key1 += kPhiloxWeyl1;
      key0_[round] = key0;
      key1_[round] = key1;
    }
    second0_ = static_cast<std::uint32_t>(first_product) ^ key0_[1];
    second2_ = static_cast<std::uint32_t>(second_product >> 32) ^ key1_[1];
    second3_ = static_cast<std::uint32_t>(second_product);
  }

  /// Words of kCount batches of blocks from `lower_number` on, in order. Calls between(0) to
  /// between(kDrawnVectors - 1) on the way, in places where the rounds leave execution units idle.
  template <int kCount, typename Between>
  [[gnu::always_inline]] void draw(std::uint32_t lower_number, I32 (&words)[kBatchVectors * kCount],
                                   const Between& between) const {
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
      if (round - 2 < kDrawnVectors) {
        between(round - 2);
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
  void draw(std::uint32_t lower_number, I32 (&words)[kBatchVectors * kCount],
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

/// True if the blocks [first, end) do not all agree in the upper 32 bits of their numbers.
inline bool straddles(std::uint64_t first, std::uint64_t end) {
  return first >> 32 != (end - 1) >> 32;
}

/// The words of a parameter's elements, which follow each other in the order of their numbers.
class RandomWords {
 public:
  explicit RandomWords(const RandomStream& stream) : stream_(stream), blocks_(stream, 0) {}

  /// Blocks that have `number` among them.
  const RandomBlocks& blocks_at(std::uint64_t number) {
    const auto upper_number = static_cast<std::uint32_t>(number >> 32);
    if (upper_number != upper_number_) {
      upper_number_ = upper_number;
      blocks_ = RandomBlocks(stream_, upper_number);
    }
    return blocks_;
  }

  /// Room that words() needs for `size` elements: whole batches, at any alignment.
  static constexpr std::int64_t capacity(std::int64_t size) {
    return size + 4 * (kBatchBlocks + 1);
  }

  /// Words of the elements [first, first + size), written to `buffer` (with room for
  /// capacity(size)); returns where the first element's word is.
  const std::uint32_t* words(std::int64_t first, std::int64_t size, std::uint32_t* buffer) {
    const auto first_word = static_cast<std::uint64_t>(first);
    const std::uint64_t end = (first_word + static_cast<std::uint64_t>(size) + 3) / 4;
    std::uint64_t number = first_word / 4;
    std::uint32_t* target = buffer;
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
      target -= 4 * (number - end_here);  // the last batch may have passed the end
      number = end_here;
    }
    return buffer + first_word % 4;
  }

 private:
  template <int kCount>
  static std::uint32_t* put(const RandomBlocks& blocks, std::uint64_t number,
                            std::uint32_t* target) {
    I32 words[kBatchVectors * kCount];
    blocks.draw<kCount>(static_cast<std::uint32_t>(number), words, Nothing());
    std::memcpy(target, words, sizeof(words));
    return target + std::int64_t{4} * kBatchBlocks * kCount;
  }

  RandomStream stream_;
  std::uint32_t upper_number_ = 0;
  RandomBlocks blocks_;
};

}  // namespace moq::kernels::cpu::MOQ_ISA
