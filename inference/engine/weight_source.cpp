#include "inference/engine/weight_source.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "inference/checkpoint/packing.h"
#include "kernels/common/check.h"
#include "kernels/common/half.h"

namespace moq::inference {
namespace {

using checkpoint::Checkpoint;
using checkpoint::TensorInfo;

constexpr std::int64_t kWordBytes = 4;  // of packed codes

// Tensors of a safetensors file need not be aligned to their elements.
template <typename T>
T load(const std::byte* bytes, std::int64_t index) {
  T value;
  std::memcpy(&value, bytes + index * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

/// Copies rows × cols of a matrix whose columns lie one behind the other. A tile reads whole cache
/// lines, and writes them.
template <typename T>
void copy_transposed(const std::byte* from, std::int64_t num_rows, Range rows, Range cols,
                     std::byte* to) {
  constexpr std::int64_t kTileRows = 64;
  constexpr std::int64_t kTileCols = 64 / sizeof(T);
  for (std::int64_t r = rows.begin; r < rows.end; r += kTileRows) {
    const std::int64_t last_row = std::min(r + kTileRows, rows.end);
    for (std::int64_t c = cols.begin; c < cols.end; c += kTileCols) {
      const std::int64_t last_col = std::min(c + kTileCols, cols.end);
      for (std::int64_t col = c; col < last_col; ++col) {
        for (std::int64_t row = r; row < last_row; ++row) {
          const std::int64_t index = (row - rows.begin) * cols.size() + col - cols.begin;
          std::memcpy(to + index * static_cast<std::int64_t>(sizeof(T)),
                      from + (col * num_rows + row) * static_cast<std::int64_t>(sizeof(T)),
                      sizeof(T));
        }
      }
    }
  }
}

float load_float(const std::byte* bytes, std::int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return float16_to_float(load<std::uint16_t>(bytes, index));
    case DType::kBFloat16:
      return bfloat16_to_float(load<std::uint16_t>(bytes, index));
    default:
      return load<float>(bytes, index);
  }
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

}  // namespace

std::optional<DType> float_dtype(std::string_view name) {
  if (name == "F32") {
    return DType::kFloat32;
  }
  if (name == "F16") {
    return DType::kFloat16;
  }
  if (name == "BF16") {
    return DType::kBFloat16;
  }
  return std::nullopt;
}

std::vector<float> read_floats(const Checkpoint& checkpoint, const TensorInfo& tensor,
                               Range elements) {
  const std::optional<DType> dtype = float_dtype(tensor.dtype);
  MOQ_CHECK(dtype.has_value(), checkpoint.directory().string(), ": ", tensor.name,
            " must be F32, F16 or BF16, got ", tensor.dtype);
  const std::byte* bytes = checkpoint.bytes(tensor.name).data();
  std::vector<float> values(static_cast<std::size_t>(elements.size()));
  for (std::int64_t i = 0; i < elements.size(); ++i) {
    values[static_cast<std::size_t>(i)] = load_float(bytes, elements.begin + i, *dtype);
  }
  return values;
}

std::optional<WeightSource> WeightSource::find(const Checkpoint& checkpoint,
                                               const std::string& name, WeightLayout layout) {
  WeightSource source(checkpoint, name, layout);
  const TensorInfo* plain = checkpoint.find(name + ".weight");
  const TensorInfo* packed = checkpoint.find(name + ".weight_packed");
  if (plain == nullptr && packed == nullptr) {
    return std::nullopt;
  }
  MOQ_CHECK(plain == nullptr || packed == nullptr, checkpoint.directory().string(), ": ", name,
            " must have .weight or .weight_packed, got both");
  source.packed_ = packed != nullptr;
  source.weight_ = source.packed_ ? packed : plain;
  source.weight_bytes_ = checkpoint.bytes(source.weight_->name).data();
  MOQ_CHECK(source.weight_->shape.size() == 2, checkpoint.directory().string(), ": ",
            source.weight_->name, " must have 2 dimensions, got shape ",
            text_of(source.weight_->shape));
  if (!source.packed_ && float_dtype(plain->dtype).has_value()) {
    source.open_plain();
  } else {
    source.open_quantized();
  }
  return source;
}

void WeightSource::open_plain() {
  dtype_ = *float_dtype(weight_->dtype);
  rows_ = weight_->shape[layout_ == WeightLayout::kOutIn ? 0 : 1];
  cols_ = weight_->shape[layout_ == WeightLayout::kOutIn ? 1 : 0];
  group_size_ = cols_;
}

// Quantized matrices are [output features, input features] whatever layout the architecture has:
// scales belong to output features, and packing runs along input features.
void WeightSource::open_quantized() {
  const std::string where = checkpoint_->directory().string() + ": ";
  rows_ = weight_->shape[0];
  if (packed_) {
    MOQ_CHECK(weight_->dtype == "I32", where, weight_->name, " must be I32, got ", weight_->dtype);
    shape_ = &checkpoint_->at(name_ + ".weight_shape");
    MOQ_CHECK(shape_->dtype == "I64" && shape_->shape == std::vector<std::int64_t>{2}, where,
              shape_->name, " must be I64 [2], got ", shape_->dtype, " ", text_of(shape_->shape));
    const std::byte* sizes = checkpoint_->bytes(shape_->name).data();
    cols_ = load<std::int64_t>(sizes, 1);
    MOQ_CHECK(load<std::int64_t>(sizes, 0) == rows_ && cols_ > 0, where, shape_->name,
              " must start with the ", rows_, " rows of ", weight_->name, ", got [",
              load<std::int64_t>(sizes, 0), ", ", cols_, "]");
    for (const int bits : {8, 4, 2, 1}) {
      const std::int64_t per_word = 32 / bits;
      if (cols_ / per_word + (cols_ % per_word != 0 ? 1 : 0) == weight_->shape[1]) {
        num_bits_ = bits;
        break;
      }
    }
    MOQ_CHECK(num_bits_ >= 2, where, weight_->name, " must hold 8-, 4- or 2-bit codes of ", cols_,
              " columns, got ", weight_->shape[1], " words a row");
  } else {
    MOQ_CHECK(weight_->dtype == "I8", where, weight_->name, " must be F32, F16, BF16 or I8, got ",
              weight_->dtype);
    cols_ = weight_->shape[1];
    num_bits_ = 8;
  }
  MOQ_CHECK(!checkpoint_->contains(name_ + ".weight_g_idx"), where, name_,
            ".weight_g_idx: groups must be in column order; export without activation ordering");
  open_scales();
}

void WeightSource::open_scales() {
  const std::string where = checkpoint_->directory().string() + ": ";
  scale_ = &checkpoint_->at(name_ + ".weight_scale");
  const std::optional<DType> dtype = float_dtype(scale_->dtype);
  MOQ_CHECK(dtype.has_value(), where, scale_->name, " must be F32, F16 or BF16, got ",
            scale_->dtype);
  dtype_ = *dtype;
  scale_bytes_ = checkpoint_->bytes(scale_->name).data();
  const auto count = static_cast<std::int64_t>(scale_->size_bytes() / size_of(dtype_));
  num_scale_rows_ = count == 1 ? 1 : rows_;
  num_groups_ = num_scale_rows_ == 0 ? 0 : count / num_scale_rows_;
  const bool row_major = scale_->shape.size() <= 1 || scale_->shape[0] == num_scale_rows_;
  MOQ_CHECK(num_groups_ >= 1 && num_groups_ * num_scale_rows_ == count && row_major &&
                cols_ % num_groups_ == 0,
            where, scale_->name, " must have one scale, or as many for each of ", rows_,
            " rows as divide ", cols_, " columns, got shape ", text_of(scale_->shape));
  group_size_ = cols_ / num_groups_;

  zero_point_ = checkpoint_->find(name_ + ".weight_zero_point");
  if (zero_point_ == nullptr) {
    return;
  }
  const std::int64_t per_word = 32 / num_bits_;
  const std::int64_t zero_rows =
      packed_ ? (num_scale_rows_ + per_word - 1) / per_word : num_scale_rows_;
  const std::int64_t zero_bytes = zero_rows * num_groups_ * (packed_ ? kWordBytes : 1);
  MOQ_CHECK(zero_point_->dtype == (packed_ ? "I32" : "I8") &&
                zero_point_->size_bytes() == static_cast<std::uint64_t>(zero_bytes),
            where, zero_point_->name, " must be ", packed_ ? "I32" : "I8", " [", zero_rows, ", ",
            num_groups_, "], got ", zero_point_->dtype, " ", text_of(zero_point_->shape));
  zero_point_bytes_ = checkpoint_->bytes(zero_point_->name).data();
}

std::vector<std::string> WeightSource::tensor_names() const {
  std::vector<std::string> names;
  const auto find_own = [&](const char* suffix) {
    return quantized() ? checkpoint_->find(name_ + suffix) : nullptr;
  };
  for (const TensorInfo* tensor : {weight_, scale_, zero_point_, shape_, find_own(".input_scale"),
                                   find_own(".input_zero_point")}) {
    if (tensor != nullptr) {
      names.push_back(tensor->name);
    }
  }
  return names;
}

const std::byte* WeightSource::plain_rows() const {
  return !quantized() && layout_ == WeightLayout::kOutIn ? weight_bytes_ : nullptr;
}

std::int64_t WeightSource::group_size_of(Range cols) const {
  if (num_groups_ <= 1) {
    return cols.size();
  }
  return std::gcd(group_size_, std::gcd(cols.begin, cols.size()));
}

float WeightSource::scale_at(std::int64_t row, std::int64_t group) const {
  const std::int64_t scale_row = num_scale_rows_ == 1 ? 0 : row;
  return load_float(scale_bytes_, scale_row * num_groups_ + group, dtype_);
}

std::int32_t WeightSource::zero_point_at(std::int64_t row, std::int64_t group) const {
  const std::int64_t scale_row = num_scale_rows_ == 1 ? 0 : row;
  if (!packed_) {
    return load<std::int8_t>(zero_point_bytes_, scale_row * num_groups_ + group);
  }
  // Packed down the rows: word (r / per_word, group) holds the zero points of per_word rows.
  const std::int64_t per_word = 32 / num_bits_;
  const std::byte* word =
      zero_point_bytes_ + (scale_row / per_word * num_groups_ + group) * kWordBytes;
  std::int8_t zero_point = 0;
  checkpoint::unpack_codes({word, kWordBytes}, num_bits_, scale_row % per_word, {&zero_point, 1});
  return zero_point;
}

void WeightSource::read_code_row(std::int64_t row, Range cols, std::span<std::int8_t> codes) const {
  const auto row_bytes = static_cast<std::size_t>(weight_->shape[1] * (packed_ ? kWordBytes : 1));
  const std::byte* data = weight_bytes_ + static_cast<std::size_t>(row) * row_bytes;
  if (packed_) {
    checkpoint::unpack_codes({data, row_bytes}, num_bits_, cols.begin, codes);
  } else {
    std::copy_n(reinterpret_cast<const std::int8_t*>(data) + cols.begin, cols.size(),
                codes.begin());
  }
}

CodeBlock WeightSource::read_codes(Range rows, Range cols, std::int64_t group_size) const {
  const std::int64_t groups = group_size == 0 ? 0 : cols.size() / group_size;
  CodeBlock block;
  block.codes.resize(static_cast<std::size_t>(rows.size() * cols.size()));
  block.scales.resize(static_cast<std::size_t>(rows.size() * groups));
  block.zero_points.resize(asymmetric() ? block.scales.size() : 0);
  const std::span<std::int8_t> codes(block.codes);
  const auto width = static_cast<std::size_t>(cols.size());
  for (std::int64_t r = 0; r < rows.size(); ++r) {
    read_code_row(rows.begin + r, cols, codes.subspan(static_cast<std::size_t>(r) * width, width));
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t stored = (cols.begin + g * group_size) / group_size_;
      const auto index = static_cast<std::size_t>(r * groups + g);
      block.scales[index] = scale_at(rows.begin + r, stored);
      if (asymmetric()) {
        block.zero_points[index] = zero_point_at(rows.begin + r, stored);
      }
    }
  }
  return block;
}

void WeightSource::copy_elements(Range rows, Range cols, std::byte* out) const {
  const auto size = static_cast<std::int64_t>(size_of(dtype_));
  if (layout_ == WeightLayout::kOutIn) {
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      out = std::copy_n(weight_bytes_ + (row * cols_ + cols.begin) * size, cols.size() * size, out);
    }
  } else if (size == 2) {
    copy_transposed<std::uint16_t>(weight_bytes_, rows_, rows, cols, out);
  } else {
    copy_transposed<std::uint32_t>(weight_bytes_, rows_, rows, cols, out);
  }
}

std::vector<float> WeightSource::read_values(Range rows, Range cols) const {
  std::vector<float> values(static_cast<std::size_t>(rows.size() * cols.size()));
  if (!quantized()) {
    std::vector<std::byte> elements(values.size() * size_of(dtype_));
    copy_elements(rows, cols, elements.data());
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = load_float(elements.data(), static_cast<std::int64_t>(i), dtype_);
    }
    return values;
  }
  const std::int64_t group = group_size_of(cols);
  const CodeBlock block = read_codes(rows, cols, group);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::size_t g = i / static_cast<std::size_t>(group);
    const std::int32_t zero = block.zero_points.empty() ? 0 : block.zero_points[g];
    values[i] = static_cast<float>(block.codes[i] - zero) * block.scales[g];
  }
  return values;
}

}  // namespace moq::inference
