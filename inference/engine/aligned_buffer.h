#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace moq::inference {

/// Bytes on the heap, aligned to a cache line. Nothing is written to them: what is never used, as
/// the end of a KV cache, takes no memory. Large ones are aligned to, and ask the system for, huge
/// pages: a decode step streams every weight once, and with 4 KiB pages it would pay an address
/// translation for each.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(std::size_t size);

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(std::byte* data) const noexcept;
  };

  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

/// Makes a buffer hold `count` floats; it never shrinks, and loses what it held if it grows.
inline void reserve_floats(AlignedBuffer& buffer, std::int64_t count) {
  const auto size = static_cast<std::size_t>(count) * sizeof(float);
  if (buffer.size() < size) {
    buffer = AlignedBuffer(size);
  }
}

}  // namespace moq::inference
