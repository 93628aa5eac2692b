#pragma once

#include <cstdint>

#include "kernels/common/host_device.h"

/// Philox4x32-10, the counter-based random generator: a pure function from (counter, key) to 128
/// random bits, so that any element's draw is computed anywhere, in any order, without state.
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
namespace moq {

/// Four 32-bit words: a counter, or what the generator makes of it.
struct PhiloxBlock {
  std::uint32_t word[4];

  friend constexpr bool operator==(const PhiloxBlock&, const PhiloxBlock&) = default;
};

/// The constants of the paper: two multipliers, and the Weyl steps that make each round's key.
constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53U;
constexpr std::uint32_t kPhiloxMultiplier1 = 0xCD9E8D57U;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9U;
constexpr std::uint32_t kPhiloxWeyl1 = 0xBB67AE85U;
constexpr int kPhiloxRounds = 10;

/// The key words of every round, two each.
struct PhiloxKeys {
  std::uint32_t word[2 * kPhiloxRounds];
};

MOQ_HOST_DEVICE constexpr PhiloxKeys philox_keys(std::uint64_t key) {
  PhiloxKeys keys{{static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)}};
  for (int i = 2; i < 2 * kPhiloxRounds; ++i) {
    keys.word[i] = keys.word[i - 2] + (i % 2 == 0 ? kPhiloxWeyl0 : kPhiloxWeyl1);
  }
  return keys;
}

/// What the rounds from kFirst on make of the words that the ones before have left.
template <int kFirst>
MOQ_HOST_DEVICE constexpr PhiloxBlock philox_rounds(PhiloxBlock counter, const PhiloxKeys& keys) {
  for (int round = kFirst; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = static_cast<std::uint64_t>(kPhiloxMultiplier0) * counter.word[0];
    const std::uint64_t product1 = static_cast<std::uint64_t>(kPhiloxMultiplier1) * counter.word[2];
    counter = {
        {static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ keys.word[2 * round],
         static_cast<std::uint32_t>(product1),
         static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ keys.word[2 * round + 1],
         static_cast<std::uint32_t>(product0)}};
  }
  return counter;
}

/// The 128 random bits that belong to `counter` under a key (low word first).
MOQ_HOST_DEVICE constexpr PhiloxBlock philox4x32(const PhiloxBlock& counter,
                                                 const PhiloxKeys& keys) {
  return philox_rounds<0>(counter, keys);
}
MOQ_HOST_DEVICE constexpr PhiloxBlock philox4x32(const PhiloxBlock& counter, std::uint64_t key) {
  return philox4x32(counter, philox_keys(key));
}

/// What the blocks of many counters share that differ in the lowest word alone: half of the first
/// two rounds.
struct PhiloxStart {
  std::uint32_t first2;   ///< after the first round, of word 2
  std::uint32_t second0;  ///< after the second round, of word 0
  std::uint32_t second2;
  std::uint32_t second3;
};

MOQ_HOST_DEVICE constexpr PhiloxStart philox_start(std::uint32_t word1, std::uint32_t word2,
                                                   std::uint32_t word3, const PhiloxKeys& keys) {
  const std::uint64_t first = static_cast<std::uint64_t>(kPhiloxMultiplier1) * word2;
  const std::uint32_t word0 = static_cast<std::uint32_t>(first >> 32) ^ word1 ^ keys.word[0];
  const std::uint64_t second = static_cast<std::uint64_t>(kPhiloxMultiplier0) * word0;
  return {word3 ^ keys.word[1], static_cast<std::uint32_t>(first) ^ keys.word[2],
          static_cast<std::uint32_t>(second >> 32) ^ keys.word[3],
          static_cast<std::uint32_t>(second)};
}

/// philox4x32 of a counter that has the words of `start` but for the lowest.
MOQ_HOST_DEVICE constexpr PhiloxBlock philox4x32(std::uint32_t word0, const PhiloxStart& start,
                                                 const PhiloxKeys& keys) {
  const std::uint64_t first = static_cast<std::uint64_t>(kPhiloxMultiplier0) * word0;
  const std::uint64_t second = static_cast<std::uint64_t>(kPhiloxMultiplier1) *
                               (static_cast<std::uint32_t>(first >> 32) ^ start.first2);
  return philox_rounds<2>({{static_cast<std::uint32_t>(second >> 32) ^ start.second0,
                            static_cast<std::uint32_t>(second),
                            static_cast<std::uint32_t>(first) ^ start.second2, start.second3}},
                          keys);
}

/// A random word as a float32 in [0, 1): a multiple of 2^-24, all of them equally likely.
MOQ_HOST_DEVICE constexpr float uniform_from_word(std::uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24F;
}

/// Draws of 16 bits in a block.
constexpr int kPhiloxHalves = 8;

/// Half `index` of a block's bits, in units of 2^-16: the low half of a word before its high one.
MOQ_HOST_DEVICE constexpr std::uint32_t half_of(const PhiloxBlock& block, int index) {
  return (block.word[index / 2] >> (index % 2 * 16)) & 0xffffU;
}

}  // namespace moq
