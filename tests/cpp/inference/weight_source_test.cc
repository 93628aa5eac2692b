#include "inference/engine/weight_source.h"

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "inference/checkpoint/packing.h"
#include "kernels/common/check.h"
#include "kernels/common/half.h"
#include "tests/cpp/inference/crafted_checkpoint.h"

namespace moq::inference {
namespace {

using checkpoint::Checkpoint;
using checkpoint::error_of;

constexpr std::int64_t kRows = 7;
constexpr std::int64_t kCols = 24;
constexpr const char* kName = "layer.proj";

struct Form {
  const char* name;
  int num_bits;
  bool packed;
  std::int64_t groups;  ///< scales per row; 0: one for the whole matrix
  bool asymmetric;
};

/// A quantized matrix in a checkpoint, and what it stands for.
class QuantizedMatrix {
 public:
  explicit QuantizedMatrix(const Form& form) : form_(form) {
    const int levels = 1 << form.num_bits;
    for (std::int64_t i = 0; i < kRows * kCols; ++i) {
      codes_.push_back(static_cast<std::int8_t>(i * 37 % levels - levels / 2));
    }
    for (std::int64_t i = 0; i < num_scales(); ++i) {
      scales_.push_back(static_cast<float>(i + 1) / 16.0F);
      zero_points_.push_back(static_cast<std::int8_t>(i * 5 % levels - levels / 2));
    }
    write();
  }

  CraftedCheckpoint& files() { return files_; }

  std::int8_t code(std::int64_t row, std::int64_t col) const {
    return codes_[static_cast<std::size_t>(row * kCols + col)];
  }
  float value(std::int64_t row, std::int64_t col) const {
    const auto scale = static_cast<std::size_t>(
        form_.groups == 0 ? 0 : row * form_.groups + col * form_.groups / kCols);
    const int zero = form_.asymmetric ? zero_points_[scale] : 0;
    return static_cast<float>(code(row, col) - zero) * scales_[scale];
  }

 private:
  std::int64_t num_scales() const { return form_.groups == 0 ? 1 : kRows * form_.groups; }

  void write() {
    const std::int64_t groups = std::max<std::int64_t>(form_.groups, 1);
    const std::int64_t scale_rows = num_scales() / groups;
    files_.set(std::string(kName) + ".weight_scale", "F32", {scale_rows, groups}, scales_);
    if (!form_.packed) {
      files_.set(std::string(kName) + ".weight", "I8", {kRows, kCols}, codes_);
      if (form_.asymmetric) {
        files_.set(std::string(kName) + ".weight_zero_point", "I8", {scale_rows, groups},
                   zero_points_);
      }
      return;
    }
    files_.set<std::int64_t>(std::string(kName) + ".weight_shape", "I64", {2}, {kRows, kCols});
    files_.set(std::string(kName) + ".weight_packed", "I32",
               {kRows, checkpoint::packed_words(kCols, form_.num_bits)},
               packed(codes_, kRows, kCols));
    if (form_.asymmetric) {
      write_packed_zero_points(scale_rows, groups);
    }
  }

  /// Zero points are packed down the rows.
  void write_packed_zero_points(std::int64_t scale_rows, std::int64_t groups) {
    const std::int64_t words = checkpoint::packed_words(scale_rows, form_.num_bits);
    std::vector<std::uint32_t> all(static_cast<std::size_t>(words * groups));
    for (std::int64_t group = 0; group < groups; ++group) {
      std::vector<std::int8_t> column;
      for (std::int64_t row = 0; row < scale_rows; ++row) {
        column.push_back(zero_points_[static_cast<std::size_t>(row * groups + group)]);
      }
      const std::vector<std::uint32_t> down = packed(column, 1, scale_rows);
      for (std::int64_t word = 0; word < words; ++word) {
        all[static_cast<std::size_t>(word * groups + group)] = down[static_cast<std::size_t>(word)];
      }
    }
    files_.set(std::string(kName) + ".weight_zero_point", "I32", {words, groups}, all);
  }

  std::vector<std::uint32_t> packed(const std::vector<std::int8_t>& codes, std::int64_t rows,
                                    std::int64_t cols) const {
    std::vector<std::uint32_t> words(
        static_cast<std::size_t>(rows * checkpoint::packed_words(cols, form_.num_bits)));
    checkpoint::pack_codes(codes, rows, cols, form_.num_bits, words);
    return words;
  }

  Form form_;
  std::vector<std::int8_t> codes_;
  std::vector<float> scales_;
  std::vector<std::int8_t> zero_points_;
  CraftedCheckpoint files_;
};

class QuantizedSource : public testing::TestWithParam<Form> {};

TEST_P(QuantizedSource, GivesEveryShardTheCodesAndValuesOfTheWhole) {
  QuantizedMatrix matrix(GetParam());
  const Checkpoint files = matrix.files().open();
  const auto source = WeightSource::find(files, kName, WeightLayout::kOutIn);
  ASSERT_TRUE(source.has_value());
  EXPECT_EQ(source->rows(), kRows);
  EXPECT_EQ(source->cols(), kCols);
  EXPECT_EQ(source->num_bits(), GetParam().num_bits);
  for (const Range rows : {Range{0, kRows}, Range{2, 3}, Range{5, kRows}, Range{4, 4}}) {
    for (std::int64_t begin = 0; begin <= kCols; ++begin) {
      for (std::int64_t end = begin; end <= kCols; ++end) {
        const Range cols{begin, end};
        const std::int64_t group_size = source->group_size_of(cols);
        const CodeBlock block = source->read_codes(rows, cols, group_size);
        const std::vector<float> values = source->read_values(rows, cols);
        ASSERT_EQ(static_cast<std::int64_t>(values.size()), rows.size() * cols.size());
        for (std::size_t i = 0; i < values.size(); ++i) {
          const std::int64_t row = rows.begin + static_cast<std::int64_t>(i) / cols.size();
          const std::int64_t col = begin + static_cast<std::int64_t>(i) % cols.size();
          const std::size_t scale = i / static_cast<std::size_t>(group_size);
          const int zero = block.zero_points.empty() ? 0 : block.zero_points[scale];
          ASSERT_EQ(block.codes[i], matrix.code(row, col));
          ASSERT_EQ(static_cast<float>(block.codes[i] - zero) * block.scales[scale],
                    matrix.value(row, col));
          ASSERT_EQ(values[i], matrix.value(row, col));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Forms, QuantizedSource,
                         testing::Values(Form{"int8_per_channel", 8, false, 1, false},
                                         Form{"int8_per_tensor", 8, false, 0, false},
                                         Form{"int8_per_group_asymmetric", 8, false, 3, true},
                                         Form{"packed8_per_channel", 8, true, 1, false},
                                         Form{"packed8_per_tensor_asymmetric", 8, true, 0, true},
                                         Form{"packed4_per_group", 4, true, 2, false},
                                         Form{"packed4_per_group_asymmetric", 4, true, 4, true},
                                         Form{"packed2_per_channel_asymmetric", 2, true, 1, true}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(WeightSource, ReadsAPlainWeightInBothLayouts) {
  CraftedCheckpoint files;
  files.set_floats(std::string(kName) + ".weight", {3, 2});
  const Checkpoint open = files.open();
  const auto linear = WeightSource::find(open, kName, WeightLayout::kOutIn);
  const auto conv1d = WeightSource::find(open, kName, WeightLayout::kInOut);
  EXPECT_EQ(linear->read_values({1, 3}, {1, 2}), (std::vector<float>{4 / 8.0F, 6 / 8.0F}));
  EXPECT_EQ(conv1d->read_values({1, 2}, {0, 3}),
            (std::vector<float>{2 / 8.0F, 4 / 8.0F, 6 / 8.0F}));
  EXPECT_EQ(WeightSource::find(open, "other", WeightLayout::kOutIn), std::nullopt);
}

/// A matrix [rows, cols] of small whole numbers, which every dtype holds, larger than a tile.
class PlainMatrix : public testing::TestWithParam<std::tuple<DType, WeightLayout>> {
 protected:
  static constexpr std::int64_t kManyRows = 131;
  static constexpr std::int64_t kManyCols = 77;

  static float number(std::int64_t row, std::int64_t col) {
    return static_cast<float>((row * 37 + col * 11) % 251 - 125);
  }
  static DType dtype() { return std::get<DType>(GetParam()); }
  static WeightLayout layout() { return std::get<WeightLayout>(GetParam()); }

  template <typename T, typename Convert>
  void write(const char* name, const Convert& convert) {
    const bool out_in = layout() == WeightLayout::kOutIn;
    const std::vector<std::int64_t> shape =
        out_in ? std::vector{kManyRows, kManyCols} : std::vector{kManyCols, kManyRows};
    std::vector<T> elements;
    for (std::int64_t i = 0; i < shape[0]; ++i) {
      for (std::int64_t j = 0; j < shape[1]; ++j) {
        elements.push_back(convert(out_in ? number(i, j) : number(j, i)));
      }
    }
    files_.set(std::string(kName) + ".weight", name, shape, elements);
  }
  void SetUp() override {
    switch (dtype()) {
      case DType::kFloat16:
        return write<std::uint16_t>("F16", float_to_float16);
      case DType::kBFloat16:
        return write<std::uint16_t>("BF16", float_to_bfloat16);
      default:
        return write<float>("F32", [](float value) { return value; });
    }
  }

  CraftedCheckpoint files_;
};

TEST_P(PlainMatrix, GivesEveryBlockAsNumbersAndAsStored) {
  const Checkpoint open = files_.open();
  const auto source = WeightSource::find(open, kName, layout());
  ASSERT_TRUE(source.has_value());
  const std::size_t size = size_of(dtype());
  for (const Range rows : {Range{0, kManyRows}, Range{63, 65}, Range{1, 130}, Range{5, 5}}) {
    for (const Range cols : {Range{0, kManyCols}, Range{15, 33}, Range{31, 32}, Range{76, 77}}) {
      const std::vector<float> values = source->read_values(rows, cols);
      ASSERT_EQ(static_cast<std::int64_t>(values.size()), rows.size() * cols.size());
      std::vector<std::byte> stored(values.size() * size);
      source->copy_elements(rows, cols, stored.data());
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::int64_t row = rows.begin + static_cast<std::int64_t>(i) / cols.size();
        const std::int64_t col = cols.begin + static_cast<std::int64_t>(i) % cols.size();
        ASSERT_EQ(values[i], number(row, col)) << row << ", " << col;
        const bool out_in = layout() == WeightLayout::kOutIn;
        const std::int64_t index = out_in ? row * kManyCols + col : col * kManyRows + row;
        ASSERT_EQ(std::memcmp(stored.data() + i * size,
                              open.bytes(std::string(kName) + ".weight").data() +
                                  static_cast<std::size_t>(index) * size,
                              size),
                  0);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Forms, PlainMatrix,
    testing::Combine(testing::Values(DType::kFloat32, DType::kFloat16, DType::kBFloat16),
                     testing::Values(WeightLayout::kOutIn, WeightLayout::kInOut)));

struct Spoiling {
  const char* name;
  Form form;
  void (*spoil)(CraftedCheckpoint& files);
  const char* message;
};

constexpr Form kInt8{"", 8, false, 3, true};
constexpr Form kPacked{"", 4, true, 3, true};

template <typename T>
std::vector<T> ones(std::int64_t count) {
  return std::vector<T>(static_cast<std::size_t>(count), T{1});
}

class SpoiltSource : public testing::TestWithParam<Spoiling> {};

TEST_P(SpoiltSource, IsRefusedNamingTheTensor) {
  QuantizedMatrix matrix(GetParam().form);
  EXPECT_NO_THROW(WeightSource::find(matrix.files().open(), kName, WeightLayout::kOutIn));
  GetParam().spoil(matrix.files());
  const Checkpoint files = matrix.files().open();
  const std::string message =
      error_of([&] { WeightSource::find(files, kName, WeightLayout::kOutIn); });
  EXPECT_NE(message.find(GetParam().message), std::string::npos) << message;
}

void set_shape(CraftedCheckpoint& files, std::int64_t rows, std::int64_t cols) {
  files.set<std::int64_t>(std::string(kName) + ".weight_shape", "I64", {2}, {rows, cols});
}

void set_scales(CraftedCheckpoint& files, const std::vector<std::int64_t>& shape) {
  files.set_floats(std::string(kName) + ".weight_scale", shape);
}

template <typename T>
void set_zero_points(CraftedCheckpoint& files, const char* dtype, std::int64_t rows,
                     std::int64_t cols) {
  files.set(std::string(kName) + ".weight_zero_point", dtype, {rows, cols}, ones<T>(rows * cols));
}

INSTANTIATE_TEST_SUITE_P(
    Tensors, SpoiltSource,
    testing::Values(
        Spoiling{"both_forms", kPacked,
                 [](auto& files) {
                   files.set_floats(std::string(kName) + ".weight", {kRows, kCols});
                 },
                 "must have .weight or .weight_packed, got both"},
        Spoiling{
            "three_dimensions", kInt8,
            [](auto& files) {
              files.set(std::string(kName) + ".weight", "I8", {7, 8, 3}, ones<std::int8_t>(168));
            },
            "must have 2 dimensions, got shape [7, 8, 3]"},
        Spoiling{"float64_weight", kInt8,
                 [](auto& files) {
                   files.set(std::string(kName) + ".weight", "F64", {7, 24}, ones<double>(168));
                 },
                 "must be F32, F16, BF16 or I8, got F64"},
        Spoiling{
            "packed_bytes", kPacked,
            [](auto& files) {
              files.set(std::string(kName) + ".weight_packed", "I8", {7, 3}, ones<std::int8_t>(21));
            },
            "must be I32, got I8"},
        Spoiling{"no_shape", kPacked,
                 [](auto& files) { files.erase(std::string(kName) + ".weight_shape"); },
                 "weight_shape"},
        Spoiling{"shape_of_three", kPacked,
                 [](auto& files) {
                   files.template set<std::int64_t>(std::string(kName) + ".weight_shape", "I64",
                                                    {3}, {7, 24, 1});
                 },
                 "must be I64 [2], got I64 [3]"},
        Spoiling{"shape_of_int32", kPacked,
                 [](auto& files) {
                   files.template set<std::int32_t>(std::string(kName) + ".weight_shape", "I32",
                                                    {2}, {7, 24});
                 },
                 "must be I64 [2], got I32 [2]"},
        Spoiling{"shape_of_other_rows", kPacked, [](auto& files) { set_shape(files, 8, kCols); },
                 "must start with the 7 rows"},
        Spoiling{"shape_of_no_columns", kPacked, [](auto& files) { set_shape(files, kRows, 0); },
                 "must start with the 7 rows"},
        Spoiling{"shape_of_negative_columns", kPacked,
                 [](auto& files) { set_shape(files, kRows, -24); }, "must start with the 7 rows"},
        Spoiling{"shape_of_more_columns", kPacked, [](auto& files) { set_shape(files, kRows, 97); },
                 "must hold 8-, 4- or 2-bit codes of 97 columns, got 3 words a row"},
        Spoiling{"shape_of_most_columns", kPacked,
                 [](auto& files) { set_shape(files, kRows, INT64_MAX); },
                 "must hold 8-, 4- or 2-bit codes"},
        Spoiling{"no_scales", kInt8,
                 [](auto& files) { files.erase(std::string(kName) + ".weight_scale"); },
                 "weight_scale"},
        Spoiling{"integer_scales", kInt8,
                 [](auto& files) {
                   files.set(std::string(kName) + ".weight_scale", "I32", {7, 3},
                             ones<std::int32_t>(21));
                 },
                 "must be F32, F16 or BF16, got I32"},
        Spoiling{"no_scale_at_all", kInt8,
                 [](auto& files) {
                   set_scales(files, {0, 3});
                 },
                 "must have one scale"},
        Spoiling{"scales_of_other_rows", kInt8,
                 [](auto& files) {
                   set_scales(files, {6, 3});
                 },
                 "must have one scale"},
        Spoiling{"scales_of_columns", kInt8,
                 [](auto& files) {
                   set_scales(files, {3, 7});
                 },
                 "must have one scale"},
        Spoiling{"scales_that_do_not_divide", kInt8,
                 [](auto& files) {
                   set_scales(files, {7, 5});
                 },
                 "as divide 24 columns, got shape [7, 5]"},
        Spoiling{"more_scales_than_columns", kInt8,
                 [](auto& files) {
                   set_scales(files, {7, 48});
                 },
                 "must have one scale"},
        Spoiling{"packed_zero_points_of_int8", kInt8,
                 [](auto& files) { set_zero_points<std::int32_t>(files, "I32", 7, 3); },
                 "must be I8 [7, 3], got I32 [7, 3]"},
        Spoiling{"unpacked_zero_points_of_words", kPacked,
                 [](auto& files) { set_zero_points<std::int8_t>(files, "I8", 7, 3); },
                 "must be I32 [1, 3], got I8 [7, 3]"},
        Spoiling{"too_few_zero_points", kInt8,
                 [](auto& files) { set_zero_points<std::int8_t>(files, "I8", 6, 3); },
                 "must be I8 [7, 3], got I8 [6, 3]"},
        Spoiling{"too_many_zero_points", kPacked,
                 [](auto& files) { set_zero_points<std::int32_t>(files, "I32", 2, 3); },
                 "must be I32 [1, 3], got I32 [2, 3]"},
        Spoiling{"group_indices", kInt8,
                 [](auto& files) {
                   files.set(std::string(kName) + ".weight_g_idx", "I32", {24},
                             ones<std::int32_t>(24));
                 },
                 "groups must be in column order"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moq::inference
