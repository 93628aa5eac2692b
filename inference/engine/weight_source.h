#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "inference/checkpoint/checkpoint.h"
#include "inference/parallel/sharding.h"
#include "inference/policies/policy.h"
#include "kernels/common/dtype.h"

namespace moq::inference {

/// Float dtype of a safetensors name: "F32", "F16", "BF16"; nullopt for any other.
std::optional<DType> float_dtype(std::string_view name);

/// A float tensor's elements [begin, end) as float32.
std::vector<float> read_floats(const checkpoint::Checkpoint& checkpoint,
                               const checkpoint::TensorInfo& tensor, Range elements);

/// Codes of a block of a quantized matrix, with the scales that its columns use.
struct CodeBlock {
  std::vector<std::int8_t> codes;         ///< [rows, cols]
  std::vector<float> scales;              ///< [rows, cols / group_size]
  std::vector<std::int32_t> zero_points;  ///< like scales; empty: all 0
};

/// One weight matrix [rows, cols] = [output features, input features] of a checkpoint, in whatever
/// form the checkpoint keeps it:
///
///   plain            <name>.weight, float32, float16 or bfloat16, Linear or Conv1D layout
///   int-quantized    <name>.weight int8 [rows, cols], <name>.weight_scale
///   pack-quantized   <name>.weight_packed int32 [rows, ceil(cols * bits / 32)], offset binary,
///                    first element in the lowest bits; <name>.weight_scale; <name>.weight_shape
///
/// Scales are [rows, groups], [rows] or one number. <name>.weight_zero_point makes the matrix
/// asymmetric: int8 in the scales' shape, or in the packed form int32, packed along the rows.
/// Reading touches only the asked-for bytes of the mapped file (and whole words of packed codes).
class WeightSource {
 public:
  /// The matrix whose parameters start with `name`; nullopt if the checkpoint has none.
  /// @throws moq::Error naming the key, what was expected and what was found, for any other form
  static std::optional<WeightSource> find(const checkpoint::Checkpoint& checkpoint,
                                          const std::string& name, WeightLayout layout);

  const std::string& name() const { return name_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  bool quantized() const { return num_bits_ > 0; }
  bool packed() const { return packed_; }     ///< pack-quantized
  int num_bits() const { return num_bits_; }  ///< width of the stored codes; 0: not quantized
  std::int64_t group_size() const { return group_size_; }  ///< columns per scale
  bool asymmetric() const { return zero_point_ != nullptr; }
  /// Of a plain weight's elements, or of a quantized one's scales.
  DType dtype() const { return dtype_; }
  /// Names of the tensors it consists of, the scale of its input among them.
  std::vector<std::string> tensor_names() const;
  /// Bytes of a plain weight in Linear layout, row-major; null for any other form.
  const std::byte* plain_rows() const;

  /// Columns per scale in the column range `cols`: group_size(), or a divisor of it where the range
  /// cuts through a group; the width of the range with one scale a row.
  std::int64_t group_size_of(Range cols) const;

  /// Codes of rows × cols with scales for every `group_size` columns.
  /// @param group_size  divides group_size_of(cols)
  CodeBlock read_codes(Range rows, Range cols, std::int64_t group_size) const;

  /// Elements of rows × cols of a plain weight as they are stored, row-major, to `out`.
  void copy_elements(Range rows, Range cols, std::byte* out) const;

  /// Values of rows × cols, float32, row-major: dequantized where quantized.
  std::vector<float> read_values(Range rows, Range cols) const;

 private:
  WeightSource(const checkpoint::Checkpoint& checkpoint, std::string name, WeightLayout layout)
      : checkpoint_(&checkpoint), name_(std::move(name)), layout_(layout) {}
  void open_plain();
  void open_quantized();
  void open_scales();
  float scale_at(std::int64_t row, std::int64_t group) const;
  std::int32_t zero_point_at(std::int64_t row, std::int64_t group) const;
  void read_code_row(std::int64_t row, Range cols, std::span<std::int8_t> codes) const;

  const checkpoint::Checkpoint* checkpoint_;
  std::string name_;
  WeightLayout layout_;
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  int num_bits_ = 0;
  std::int64_t group_size_ = 0;
  std::int64_t num_groups_ = 0;      ///< scales per row
  std::int64_t num_scale_rows_ = 0;  ///< rows_, or 1 with one scale for the whole matrix
  DType dtype_ = DType::kFloat32;
  const checkpoint::TensorInfo* weight_ = nullptr;
  const checkpoint::TensorInfo* scale_ = nullptr;
  const checkpoint::TensorInfo* zero_point_ = nullptr;
  const checkpoint::TensorInfo* shape_ = nullptr;
  const std::byte* weight_bytes_ = nullptr;
  const std::byte* scale_bytes_ = nullptr;
  const std::byte* zero_point_bytes_ = nullptr;
  bool packed_ = false;
};

}  // namespace moq::inference
