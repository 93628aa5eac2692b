#include "inference/engine/aligned_buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace moq::inference {
namespace {

constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20U;

}  // namespace

AlignedBuffer::AlignedBuffer(std::size_t size) : size_(size) {
  if (size == 0) {
    return;
  }
  const std::size_t alignment = size >= kHugePage ? kHugePage : kCacheLine;
  const std::size_t rounded = (size + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(alignment, rounded)));
  if (data_ == nullptr) {
    throw std::bad_alloc();
  }
  if (alignment == kHugePage) {
    // Advice only: where huge pages are off, the buffer works as it is.
    (void)madvise(data_.get(), rounded, MADV_HUGEPAGE);
  }
}

void AlignedBuffer::Free::operator()(std::byte* data) const noexcept {
  std::free(data);
}

}  // namespace moq::inference
