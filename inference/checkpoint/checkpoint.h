#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "inference/checkpoint/safetensors.h"

namespace moq::checkpoint {

/// The tensors of a Hugging Face style directory: model.safetensors alone, or the shards that
/// model.safetensors.index.json names. Keeps the files mapped for as long as it lives.
///
/// The index is trusted no more than the files: shard names are plain file names of this directory
/// (no separators, no ".."), every listed key is in the file that the index names, every tensor of
/// a shard is listed, and no key is in two files.
class Checkpoint {
 public:
  /// @throws moq::Error naming file and key if the directory holds no safetensors checkpoint, both
  ///         forms at once, or anything that the rules above or SafetensorsFile::open refuse
  static Checkpoint open(const std::filesystem::path& directory);

  const std::filesystem::path& directory() const { return directory_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }
  /// Every tensor's name, sorted.
  std::vector<std::string> names() const;

  bool contains(std::string_view name) const { return find(name) != nullptr; }
  /// The tensor of that name; null if there is none.
  const TensorInfo* find(std::string_view name) const;
  /// The tensor of that name.
  /// @throws moq::Error naming the directory and the key if there is none
  const TensorInfo& at(std::string_view name) const;
  /// Its bytes: see SafetensorsFile::bytes.
  /// @throws moq::Error naming the directory and the key if there is none
  std::span<const std::byte> bytes(std::string_view name) const;

 private:
  struct Location {
    std::size_t file;
    const TensorInfo* tensor;
  };

  explicit Checkpoint(std::filesystem::path directory) : directory_(std::move(directory)) {}
  void open_shards(const std::filesystem::path& index_path);
  void index_tensors();
  const Location& locate(std::string_view name) const;

  std::filesystem::path directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Location, std::less<>> by_name_;
};

}  // namespace moq::checkpoint
