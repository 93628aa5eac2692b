#include "inference/checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "inference/checkpoint/json.h"
#include "kernels/common/check.h"

namespace moq::checkpoint {
namespace {

// The format is little-endian, and so are the views that bytes() hands out.
static_assert(std::endian::native == std::endian::little);

constexpr std::string_view kMetadataKey = "__metadata__";
constexpr std::uint64_t kLengthBytes = 8;  // the header's length, in front of the header
constexpr std::size_t kMaxRank = 16;       // real tensors have at most five dimensions

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t dimension : shape) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(dimension);
  }
  return text + "]";
}

/// {"dtype": …, "shape": […], "data_offsets": [begin, end]}, each key exactly once.
TensorInfo read_tensor(JsonReader& reader, std::string name, const std::string& file) {
  TensorInfo tensor;
  tensor.name = std::move(name);
  const std::string where = file + ": " + tensor.name;
  bool has_dtype = false;
  bool has_shape = false;
  bool has_offsets = false;
  const auto claim = [&](bool unread, const std::string& key) {
    MOQ_CHECK(unread, where, ": expected every key once, got '", key, "' again");
  };
  reader.read_object([&](const std::string& key) {
    if (key == "dtype") {
      claim(!std::exchange(has_dtype, true), key);
      tensor.dtype = reader.read_string();
    } else if (key == "shape") {
      claim(!std::exchange(has_shape, true), key);
      reader.read_array([&] {
        MOQ_CHECK(tensor.shape.size() < kMaxRank, where, ": expected at most ", kMaxRank,
                  " dimensions, got more");
        tensor.shape.push_back(reader.read_integer());
      });
    } else if (key == "data_offsets") {
      claim(!std::exchange(has_offsets, true), key);
      int count = 0;
      reader.read_array([&] {
        MOQ_CHECK(count < 2, where, ": expected two data_offsets, got more");
        (count++ == 0 ? tensor.begin : tensor.end) = reader.read_unsigned();
      });
      MOQ_CHECK(count == 2, where, ": expected two data_offsets, got ", count);
    } else {
      moq::detail::fail(where, ": expected dtype, shape and data_offsets, got the key '", key, "'");
    }
  });
  MOQ_CHECK(has_dtype && has_shape && has_offsets, where, ": expected dtype, shape and ",
            "data_offsets, got no ",
            !has_dtype   ? "dtype"
            : !has_shape ? "shape"
                         : "data_offsets");
  return tensor;
}

}  // namespace

std::optional<std::uint64_t> item_size(std::string_view dtype) {
  constexpr std::array<std::pair<std::string_view, std::uint64_t>, 17> kSizes = {{
      {"BOOL", 1},
      {"U8", 1},
      {"I8", 1},
      {"F8_E4M3", 1},
      {"F8_E5M2", 1},
      {"F8_E8M0", 1},
      {"I16", 2},
      {"U16", 2},
      {"F16", 2},
      {"BF16", 2},
      {"I32", 4},
      {"U32", 4},
      {"F32", 4},
      {"I64", 8},
      {"U64", 8},
      {"F64", 8},
      {"C64", 8},
  }};
  const auto* const entry = std::find_if(kSizes.begin(), kSizes.end(),
                                         [&](const auto& size) { return size.first == dtype; });
  return entry == kSizes.end() ? std::nullopt : std::optional(entry->second);
}

std::uint64_t tensor_size_bytes(std::string_view dtype, std::span<const std::int64_t> shape,
                                std::string_view where) {
  const std::optional<std::uint64_t> item = item_size(dtype);
  MOQ_CHECK(item.has_value(), where, ": expected a known dtype, got '", dtype, "'");
  auto size = static_cast<std::int64_t>(*item);
  bool overflow = false;
  bool empty = false;
  for (const std::int64_t dimension : shape) {
    MOQ_CHECK(dimension >= 0, where, ": expected dimensions >= 0, got the shape ",
              shape_text(shape));
    // A dimension of 0 makes the tensor empty, but does not excuse the others from being sane.
    empty = empty || dimension == 0;
    overflow =
        overflow || __builtin_mul_overflow(size, std::max<std::int64_t>(dimension, 1), &size);
  }
  MOQ_CHECK(!overflow, where, ": expected a size below 2^63 bytes, got the shape ",
            shape_text(shape), " of ", dtype);
  return empty ? 0 : static_cast<std::uint64_t>(size);
}

SafetensorsFile::SafetensorsFile(std::filesystem::path path, MappedFile file)
    : path_(std::move(path)), file_(std::move(file)) {}

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  SafetensorsFile result(path, MappedFile::open(path));
  const std::string where = path.string();
  const std::span<const std::byte> bytes = result.file_.bytes();
  MOQ_CHECK(bytes.size() >= kLengthBytes, where, ": expected at least 8 bytes, got ", bytes.size());
  std::uint64_t header_size = 0;
  std::memcpy(&header_size, bytes.data(), kLengthBytes);
  MOQ_CHECK(header_size <= kMaxHeaderBytes, where, ": expected a header of at most ",
            kMaxHeaderBytes, " bytes, got ", header_size);
  MOQ_CHECK(header_size <= bytes.size() - kLengthBytes, where, ": expected a header of ",
            header_size, " bytes, got a file with ", bytes.size() - kLengthBytes,
            " bytes after the header's length");
  result.data_begin_ = kLengthBytes + header_size;
  const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes,
                                header_size);
  MOQ_CHECK(header.starts_with('{'), where, ": expected the header to start with '{'");
  result.read_header(header, bytes.size() - result.data_begin_);
  return result;
}

void SafetensorsFile::read_header(std::string_view header, std::uint64_t data_size) {
  const std::string where = path_.string();
  const std::string header_name = where + ": header";
  JsonReader reader(header, header_name);
  bool has_metadata = false;
  reader.read_object([&](std::string key) {
    if (key != kMetadataKey) {
      MOQ_CHECK(!key.empty(), where, ": expected every tensor to have a name, got an empty one");
      tensors_.push_back(read_tensor(reader, std::move(key), where));
      return;
    }
    MOQ_CHECK(!std::exchange(has_metadata, true), where,
              ": expected __metadata__ once, got it again");
    reader.read_object([&](std::string name) {
      std::string value = reader.read_string();
      const auto [entry, inserted] = metadata_.emplace(std::move(name), std::move(value));
      MOQ_CHECK(inserted, where, ": __metadata__: expected every key once, got '", entry->first,
                "' again");
    });
  });
  reader.finish();
  index_tensors(data_size);
}

void SafetensorsFile::index_tensors(std::uint64_t data_size) {
  const std::string file = path_.string();
  // Empty tensors sort before the one that starts at their offset, so that coverage is one pass.
  std::stable_sort(tensors_.begin(), tensors_.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t covered = 0;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const TensorInfo& tensor = tensors_[i];
    const std::string where = file + ": " + tensor.name;
    MOQ_CHECK(tensor.begin <= tensor.end && tensor.end <= data_size, where,
              ": expected data_offsets within the ", data_size, " bytes of data, got [",
              tensor.begin, ", ", tensor.end, "]");
    const std::uint64_t expected = tensor_size_bytes(tensor.dtype, tensor.shape, where);
    MOQ_CHECK(tensor.size_bytes() == expected, where, ": expected ", expected, " bytes for ",
              tensor.dtype, " ", shape_text(tensor.shape), ", got ", tensor.size_bytes());
    MOQ_CHECK(tensor.begin == covered, where, ": expected its data at offset ", covered,
              tensor.begin < covered ? " (it overlaps the tensor before)" : " (there is a hole)",
              ", got ", tensor.begin);
    covered = tensor.end;
    MOQ_CHECK(by_name_.emplace(tensor.name, i).second, where,
              ": expected every tensor once, got this one again");
  }
  MOQ_CHECK(covered == data_size, file, ": expected ", covered, " bytes of data, got ", data_size);
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const {
  const auto entry = by_name_.find(name);
  return entry == by_name_.end() ? nullptr : &tensors_[entry->second];
}

std::span<const std::byte> SafetensorsFile::bytes(const TensorInfo& tensor) const {
  return file_.bytes().subspan(data_begin_ + tensor.begin, tensor.size_bytes());
}

}  // namespace moq::checkpoint
