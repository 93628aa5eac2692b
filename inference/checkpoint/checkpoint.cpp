#include "inference/checkpoint/checkpoint.h"

#include <set>
#include <system_error>
#include <utility>

#include "inference/checkpoint/json.h"
#include "kernels/common/check.h"

namespace moq::checkpoint {
namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr std::size_t kMaxIndexBytes = 32U << 20U;  // twice the largest one known

/// An index may come from anywhere: a name with a separator could lead out of the directory.
void check_shard_name(const std::string& name, const std::string& key, const std::string& index) {
  const bool plain = !name.empty() && name != "." && name != ".." &&
                     name.find('/') == std::string::npos && name.find('\\') == std::string::npos &&
                     name.find('\0') == std::string::npos && name.ends_with(".safetensors");
  MOQ_CHECK(plain, index, ": ", key,
            ": expected the plain name of a .safetensors file in the same directory, got '", name,
            "'");
}

/// What there is under a name. A name that the file system can't have, because it is too long for
/// instance, is one that is missing, not an exception of another type.
std::filesystem::file_status status_of(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::status(path, ignored);
}

/// Key -> shard of the index's weight_map. Read value by value, because an index lists a hundred
/// thousand tensors of a large model, and a document of any text that long takes twenty times its
/// bytes.
std::map<std::string, std::string> read_weight_map(const std::filesystem::path& path) {
  const std::string where = path.string();
  const std::string text = read_text_file(path, kMaxIndexBytes);
  JsonReader reader(text, where);
  std::map<std::string, std::string> weight_map;
  bool has_map = false;
  reader.read_object([&](const std::string& section) {
    if (section != "weight_map") {
      reader.skip_value();
      return;
    }
    MOQ_CHECK(!std::exchange(has_map, true), where,
              ": expected every key once, but 'weight_map' is repeated");
    reader.read_object([&](std::string key) {
      std::string shard = reader.read_string();
      check_shard_name(shard, key, where);
      const auto [entry, inserted] = weight_map.emplace(std::move(key), std::move(shard));
      MOQ_CHECK(inserted, where, ": weight_map: expected every key once, but '", entry->first,
                "' is repeated");
    });
  });
  reader.finish();
  MOQ_CHECK(has_map, where, ": expected the key 'weight_map', which is missing");
  return weight_map;
}

}  // namespace

Checkpoint Checkpoint::open(const std::filesystem::path& directory) {
  const std::string where = directory.string();
  MOQ_CHECK(is_directory(status_of(directory)), where, ": expected a checkpoint directory, got ",
            exists(status_of(directory)) ? "something else" : "nothing");
  const std::filesystem::path single = directory / kSingleFile;
  const std::filesystem::path index = directory / kIndexFile;
  const bool has_single = exists(status_of(single));
  const bool has_index = exists(status_of(index));
  MOQ_CHECK(has_single || has_index, where, ": expected ", kSingleFile, " or ", kIndexFile,
            ", got neither");
  MOQ_CHECK(!(has_single && has_index), where, ": expected either ", kSingleFile, " or ",
            kIndexFile, ", got both: remove the one that does not belong");
  Checkpoint checkpoint(directory);
  if (has_single) {
    checkpoint.files_.push_back(SafetensorsFile::open(single));
    checkpoint.index_tensors();
  } else {
    checkpoint.open_shards(index);
  }
  return checkpoint;
}

void Checkpoint::open_shards(const std::filesystem::path& index_path) {
  const std::string where = index_path.string();
  const std::map<std::string, std::string> weight_map = read_weight_map(index_path);
  std::set<std::string> shards;
  for (const auto& [key, shard] : weight_map) {
    shards.insert(shard);
  }
  files_.reserve(shards.size());
  for (const std::string& shard : shards) {
    MOQ_CHECK(exists(status_of(directory_ / shard)), where, ": expected the shard '", shard,
              "' in the same directory, got no such file");
    files_.push_back(SafetensorsFile::open(directory_ / shard));
  }
  index_tensors();
  for (const auto& [key, shard] : weight_map) {
    const auto entry = by_name_.find(key);
    const std::string found =
        entry == by_name_.end() ? "none" : files_[entry->second.file].path().filename().string();
    MOQ_CHECK(found == shard, where, ": ", key, ": expected in '", shard, "', got it in ",
              entry == by_name_.end() ? "no file" : "'" + found + "'");
  }
  for (const auto& [name, location] : by_name_) {
    MOQ_CHECK(weight_map.contains(name), files_[location.file].path().string(), ": ", name,
              ": expected every tensor to be listed in ", kIndexFile, ", which does not name it");
  }
}

void Checkpoint::index_tensors() {
  for (std::size_t file = 0; file < files_.size(); ++file) {
    for (const TensorInfo& tensor : files_[file].tensors()) {
      const auto [entry, inserted] = by_name_.emplace(tensor.name, Location{file, &tensor});
      MOQ_CHECK(inserted, files_[file].path().string(), ": ", tensor.name,
                ": expected every tensor in one file, got it in '",
                files_[entry->second.file].path().filename().string(), "' too");
    }
  }
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(by_name_.size());
  for (const auto& [name, location] : by_name_) {
    names.push_back(name);
  }
  return names;
}

const TensorInfo* Checkpoint::find(std::string_view name) const {
  const auto entry = by_name_.find(name);
  return entry == by_name_.end() ? nullptr : entry->second.tensor;
}

const Checkpoint::Location& Checkpoint::locate(std::string_view name) const {
  const auto entry = by_name_.find(name);
  MOQ_CHECK(entry != by_name_.end(), directory_.string(), ": expected the tensor '", name,
            "', which is missing");
  return entry->second;
}

const TensorInfo& Checkpoint::at(std::string_view name) const {
  return *locate(name).tensor;
}

std::span<const std::byte> Checkpoint::bytes(std::string_view name) const {
  const Location& location = locate(name);
  return files_[location.file].bytes(*location.tensor);
}

}  // namespace moq::checkpoint
