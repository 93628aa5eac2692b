#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace moq::checkpoint {

/// A regular file mapped read-only into memory. Pages are read when they are first touched, so
/// that a process pays for the bytes it uses and for no others.
class MappedFile {
 public:
  /// @throws moq::Error naming the file if it cannot be opened or mapped, or is not a regular file
  static MappedFile open(const std::filesystem::path& path);

  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(const std::byte* data, std::size_t size) : data_(data), size_(size) {}

  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// The whole of a small text file (a config, a policy).
/// @throws moq::Error naming the file if it cannot be read, is not a regular file, or holds more
///         than `max_bytes`
std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes = 4U << 20U);

}  // namespace moq::checkpoint
