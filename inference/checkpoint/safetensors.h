#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "inference/checkpoint/mapped_file.h"

namespace moq::checkpoint {

/// One tensor of a safetensors file.
struct TensorInfo {
  std::string name;
  std::string dtype;  ///< as written: "F32", "BF16", "F16", "I8", "I32", "I64", "U8", …
  std::vector<std::int64_t> shape;  ///< row-major; empty: a scalar
  std::uint64_t begin = 0;          ///< first byte, counted from the end of the header
  std::uint64_t end = 0;            ///< one past the last byte; end - begin == elements * item size

  std::uint64_t size_bytes() const { return end - begin; }
};

/// Bytes of one element of a safetensors dtype ("F32": 4); nullopt for a name that is none of them.
/// Types that are not a whole number of bytes (F4, F6_…) count as unknown.
std::optional<std::uint64_t> item_size(std::string_view dtype);

/// Number of bytes of a tensor.
/// @throws moq::Error naming `where` for an unknown dtype, a negative dimension, or a size that
///         overflows 63 bits
std::uint64_t tensor_size_bytes(std::string_view dtype, std::span<const std::int64_t> shape,
                                std::string_view where);

/// A safetensors file, open for reading. The file is mapped: opening reads the header only, and
/// tensor bytes are read when they are first touched.
///
/// Nothing in the file is trusted. Before the object exists, all of this holds, and otherwise
/// open() throws moq::Error naming file, tensor, what was expected and what was found:
///   - the header's length fits the file and kMaxHeaderBytes; the header is strict JSON (json.h);
///   - every tensor has exactly dtype, shape and data_offsets, a known dtype, at most 16
///   dimensions,
///     each >= 0, and end - begin bytes == elements * item size, computed without overflow;
///   - names are unique and not empty; the tensors, ordered by offset, cover the data without a
///     hole, an overlap or a byte left over.
/// Memory taken is in proportion to the header that is really there.
///
/// A file that another process truncates while it is mapped raises SIGBUS on access, as with any
/// mapping: exported directories are replaced as a whole and never changed in place.
class SafetensorsFile {
 public:
  /// The limit of the reference implementation.
  static constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

  /// @throws moq::Error as described above, and if the file cannot be read
  static SafetensorsFile open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return path_; }
  /// In the order of their bytes.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  /// The header's __metadata__.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// The tensor of that name; null if there is none.
  const TensorInfo* find(std::string_view name) const;
  /// Bytes of a tensor of this file, little-endian, row-major. Their alignment is what the file has
  /// (SafetensorsWriter aligns elements): copy, or check, before reading wider types in place.
  std::span<const std::byte> bytes(const TensorInfo& tensor) const;

 private:
  SafetensorsFile(std::filesystem::path path, MappedFile file);
  void read_header(std::string_view header, std::uint64_t data_size);
  void index_tensors(std::uint64_t data_size);

  std::filesystem::path path_;
  MappedFile file_;
  std::uint64_t data_begin_ = 0;  ///< bytes before the data: 8 + header
  std::vector<TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
  std::unordered_map<std::string_view, std::size_t> by_name_;  ///< views into tensors_
};

}  // namespace moq::checkpoint
