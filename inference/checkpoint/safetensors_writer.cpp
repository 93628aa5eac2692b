#include "inference/checkpoint/safetensors_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <tuple>
#include <utility>

#include "inference/checkpoint/json.h"
#include "kernels/common/check.h"

namespace moq::checkpoint {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

/// Orders the tensors and gives each its place.
void lay_out(std::vector<TensorInfo>& tensors, const std::string& file) {
  std::set<std::string_view> names;
  for (const TensorInfo& tensor : tensors) {
    MOQ_CHECK(!tensor.name.empty() && tensor.name != "__metadata__", file,
              ": expected a tensor's name, got '", tensor.name, "'");
    MOQ_CHECK(names.insert(tensor.name).second, file, ": ", tensor.name,
              ": expected every tensor once, got this one again");
    MOQ_CHECK(item_size(tensor.dtype).has_value(), file, ": ", tensor.name,
              ": expected a known dtype, got '", tensor.dtype, "'");
  }
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tuple(*item_size(b.dtype), a.name) < std::tuple(*item_size(a.dtype), b.name);
  });
  std::uint64_t offset = 0;
  for (TensorInfo& tensor : tensors) {
    tensor.begin = offset;
    offset += tensor_size_bytes(tensor.dtype, tensor.shape, file + ": " + tensor.name);
    tensor.end = offset;
  }
}

std::string header_text(const std::vector<TensorInfo>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  Json::Object header;
  if (!metadata.empty()) {
    Json::Object entries;
    for (const auto& [key, value] : metadata) {
      entries.emplace_back(key, value);
    }
    header.emplace_back("__metadata__", std::move(entries));
  }
  for (const TensorInfo& tensor : tensors) {
    Json::Array shape(tensor.shape.begin(), tensor.shape.end());
    Json::Array offsets{static_cast<std::int64_t>(tensor.begin),
                        static_cast<std::int64_t>(tensor.end)};
    header.emplace_back(tensor.name, Json::Object{{"dtype", tensor.dtype},
                                                  {"shape", std::move(shape)},
                                                  {"data_offsets", std::move(offsets)}});
  }
  std::string text = Json(std::move(header)).dump();
  const std::size_t excess = (sizeof(std::uint64_t) + text.size()) % kAlignment;
  text.append(excess == 0 ? 0 : kAlignment - excess, ' ');
  return text;
}

}  // namespace

SafetensorsWriter::SafetensorsWriter(std::filesystem::path path, std::vector<TensorInfo> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : path_(std::move(path)), tensors_(std::move(tensors)) {
  lay_out(tensors_, path_.string());
  const std::string header = header_text(tensors_, metadata);
  MOQ_CHECK(header.size() <= SafetensorsFile::kMaxHeaderBytes, path_.string(),
            ": expected a header of at most ", SafetensorsFile::kMaxHeaderBytes, " bytes, got ",
            header.size(), ": write fewer tensors a file");
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  MOQ_CHECK(descriptor_ >= 0, path_.string(), ": ", std::strerror(errno));
  const std::uint64_t length = header.size();
  append(std::as_bytes(std::span(&length, 1)));
  append(std::as_bytes(std::span(header)));
}

SafetensorsWriter::~SafetensorsWriter() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
}

void SafetensorsWriter::append(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) {
      continue;
    }
    MOQ_CHECK(written > 0, path_.string(), ": writing ", bytes.size(),
              " bytes: ", std::strerror(written < 0 ? errno : ENOSPC));
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  MOQ_CHECK(descriptor_ >= 0 && next_ < tensors_.size(), path_.string(), ": expected at most ",
            tensors_.size(), " tensors, got one more");
  const TensorInfo& tensor = tensors_[next_];
  MOQ_CHECK(bytes.size() == tensor.size_bytes(), path_.string(), ": ", tensor.name, ": expected ",
            tensor.size_bytes(), " bytes, got ", bytes.size());
  append(bytes);
  ++next_;
}

void SafetensorsWriter::finish() {
  MOQ_CHECK(descriptor_ >= 0, path_.string(), ": the file is finished already");
  MOQ_CHECK(next_ == tensors_.size(), path_.string(), ": expected ", tensors_.size(),
            " tensors, got ", next_, ": ", tensors_[next_].name, " was not written");
  MOQ_CHECK(::fsync(descriptor_) == 0, path_.string(), ": flushing: ", std::strerror(errno));
  const int closed = ::close(std::exchange(descriptor_, -1));
  MOQ_CHECK(closed == 0, path_.string(), ": closing: ", std::strerror(errno));
}

}  // namespace moq::checkpoint
