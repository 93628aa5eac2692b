#include "kernels/cpu/simd/bandwidth.h"

#include "kernels/cpu/simd/vector.h"

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
using Words = std::uint64_t __attribute__((vector_size(4 * kWidth)));
#else
using Words = std::uint64_t;
#endif

std::uint64_t fold(Words words) {
  std::uint64_t lanes[sizeof(Words) / 8];
  std::memcpy(lanes, &words, sizeof(words));
  std::uint64_t result = 0;
  for (const std::uint64_t lane : lanes) {
    result ^= lane;
  }
  return result;
}

template <bool kPrefetch>
std::uint64_t read(const std::byte* memory, std::size_t size) {
  constexpr std::size_t kStep = 512;       // bytes a turn
  constexpr std::size_t kDistance = 4096;  // bytes ahead: a page, where hardware prefetchers stop
  constexpr std::size_t kLine = 64;
  Words parts[8]{};
  std::size_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    if constexpr (kPrefetch) {
      for (std::size_t line = 0; line < kStep; line += kLine) {
        __builtin_prefetch(memory + i + kDistance + line, 0, 3);
      }
    }
#pragma GCC unroll 64
    for (std::size_t word = 0; word < kStep / sizeof(Words); ++word) {
      parts[word % 8] ^= load_bits<Words>(memory + i + word * sizeof(Words));
    }
  }
  std::uint64_t result = 0;
  for (const Words part : parts) {
    result ^= fold(part);
  }
  for (; i < size; i += 8) {
    result ^= load_bits<std::uint64_t>(memory + i);
  }
  return result;
}

}  // namespace

std::uint64_t read_words(const std::byte* memory, std::size_t size, bool prefetch) {
  return prefetch ? read<true>(memory, size) : read<false>(memory, size);
}

}  // namespace moq::kernels::cpu::MOQ_ISA
