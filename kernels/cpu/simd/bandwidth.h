#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/isa.h"

/// What kernels/cpu/bandwidth.cpp asks of each instruction set: parts of the work that one thread
/// does, without checks.
namespace moq::kernels::cpu {

// clang-format off
MOQ_FOR_EACH_ISA(
  /// Exclusive-or of size / 8 words, `size` a multiple of 8: reads memory as fast as a core can.
  std::uint64_t read_words(const std::byte* memory, std::size_t size, bool prefetch);
)
// clang-format on

}  // namespace moq::kernels::cpu
