#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "inference/checkpoint/safetensors.h"

namespace moq::checkpoint {

/// Writes one safetensors file, tensor after tensor, without holding more than the caller's bytes.
///
/// The header is padded so that the data starts at a multiple of 64 bytes, and the tensors are laid
/// out by falling element size, then by name: every element is aligned to its own size, as readers
/// that map the file expect.
///
///   SafetensorsWriter writer(path, {{.name = "w", .dtype = "F32", .shape = {2, 3}}}, {});
///   for (const TensorInfo& tensor : writer.tensors()) writer.write(bytes_of(tensor.name));
///   writer.finish();
///
/// A writer that is destroyed before finish() leaves an incomplete file behind.
class SafetensorsWriter {
 public:
  /// Creates (or truncates) the file and writes its header.
  /// @param tensors   name, dtype and shape of each; begin and end are computed
  /// @param metadata  becomes __metadata__; {"format": "pt"} is what Hugging Face readers look for
  /// @throws moq::Error for an empty or repeated name, an unknown dtype, a bad shape, or a file
  ///         that cannot be written
  SafetensorsWriter(std::filesystem::path path, std::vector<TensorInfo> tensors,
                    const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// In the order in which write() wants their bytes.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }

  /// Appends the bytes of the next tensor.
  /// @throws moq::Error naming file and tensor if the size is not the tensor's, after the last
  ///         tensor, or if writing fails
  void write(std::span<const std::byte> bytes);

  /// Flushes the file to the disk and closes it.
  /// @throws moq::Error naming the first tensor that was not written, or if flushing fails
  void finish();

 private:
  void append(std::span<const std::byte> bytes);

  std::filesystem::path path_;
  std::vector<TensorInfo> tensors_;
  std::size_t next_ = 0;
  int descriptor_ = -1;
};

}  // namespace moq::checkpoint
