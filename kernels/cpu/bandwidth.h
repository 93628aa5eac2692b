#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace moq::kernels::cpu {

/// One reading of a buffer.
struct ReadMeasurement {
  double bytes_per_second;
  std::uint64_t exclusive_or;  ///< of all 8-byte words: proof that every one of them was read
};

/// Reads `buffer` once, front to back, on up to num_threads() threads and measures the time: the
/// denominator of every "share of the read bandwidth". A caller takes the best of several readings,
/// with and without prefetching, of a buffer several times larger than the last-level cache.
/// @param prefetch  ask for lines ahead of the loads; which form is faster depends on the processor
/// @throws moq::Error if the buffer's size is zero or not a multiple of 8 bytes.
ReadMeasurement measure_read(std::span<const std::byte> buffer, bool prefetch);

}  // namespace moq::kernels::cpu
