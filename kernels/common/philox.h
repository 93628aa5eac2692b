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

/// The 128 random bits that belong to `counter` under a key (low word first).
MOQ_HOST_DEVICE constexpr PhiloxBlock philox4x32(PhiloxBlock counter, const PhiloxKeys& keys) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
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
MOQ_HOST_DEVICE constexpr PhiloxBlock philox4x32(PhiloxBlock counter, std::uint64_t key) {
  return philox4x32(counter, philox_keys(key));
}

/// A random word as a float32 in [0, 1): a multiple of 2^-24, all of them equally likely.
MOQ_HOST_DEVICE constexpr float uniform_from_word(std::uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24F;
}

}  // namespace moq
