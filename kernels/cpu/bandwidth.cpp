#include "kernels/cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "kernels/common/check.h"
#include "kernels/common/integer_math.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/simd/bandwidth.h"

namespace moq::kernels::cpu {

ReadMeasurement measure_read(std::span<const std::byte> buffer, bool prefetch) {
  const auto size = static_cast<std::int64_t>(buffer.size());
  MOQ_CHECK(size > 0 && size % 8 == 0,
            "measure_read: the buffer's size must be a positive multiple of 8 bytes, got ", size);
  // One range per thread, in whole cache lines.
  const std::int64_t lines = divide_up(size, 64);
  const std::int64_t grain = divide_up(lines, num_threads());
  std::atomic<std::uint64_t> exclusive_or{0};
  const auto start = std::chrono::steady_clock::now();
  parallel_for(lines, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t bytes = std::min(end * 64, size) - begin * 64;
    exclusive_or ^= MOQ_DISPATCH_ISA(read_words, buffer.data() + begin * 64,
                                     static_cast<std::size_t>(bytes), prefetch);
  });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return {static_cast<double>(size) / elapsed.count(), exclusive_or};
}

}  // namespace moq::kernels::cpu
