#include "inference/engine/packed_weights.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "inference/engine/aligned_buffer.h"
#include "kernels/common/check.h"
#include "kernels/common/half.h"
#include "kernels/common/parallel.h"
#include "kernels/fake_quantize.h"

namespace moq::inference {
namespace {

using kernels::InputMode;
using kernels::WeightFormat;
using Slices = std::vector<RowSlice>;

// Rows that a thread reads and converts at once; bounds what loading needs beside the packed
// weights.
constexpr std::int64_t kRowsAtOnce = 64;

WeightFormat integer_format(int num_bits) {
  return num_bits > 4   ? WeightFormat::kInt8
         : num_bits > 2 ? WeightFormat::kInt4
                        : WeightFormat::kInt2;
}

/// Codes and scales of a float matrix's block, quantized to 8 bits per output feature.
CodeBlock quantize_rows(const WeightSource& source, Range rows, Range cols) {
  // Scales belong to whole rows, so whole rows are read even where a part of the columns is kept.
  const auto size = static_cast<std::size_t>(rows.size() * source.cols());
  std::vector<std::byte> elements(size * size_of(source.dtype()));
  source.copy_elements(rows, {0, source.cols()}, elements.data());
  std::vector<std::int8_t> codes(size);
  std::vector<float> stored_scales(static_cast<std::size_t>(rows.size()));
  const kernels::FakeQuantizeTensor tensor{.input = elements.data(),
                                           .codes = codes.data(),
                                           .scales = stored_scales.data(),
                                           .rows = rows.size(),
                                           .cols = source.cols(),
                                           .row_stride = source.cols(),
                                           .col_stride = 1,
                                           .input_dtype = source.dtype(),
                                           .scale_dtype = DType::kFloat32};
  const std::int32_t num_bits = 8;
  kernels::cpu::fake_quantize({.tensors = {&tensor, 1}, .num_bits = &num_bits});
  for (const float scale : stored_scales) {
    MOQ_CHECK(std::isfinite(scale), source.name(),
              ".weight must hold finite numbers to be quantized, got a NaN or an infinity");
  }
  CodeBlock block;
  block.scales = std::move(stored_scales);
  if (cols.size() == source.cols()) {
    block.codes = std::move(codes);
    return block;
  }
  block.codes.resize(static_cast<std::size_t>(rows.size() * cols.size()));
  for (std::int64_t r = 0; r < rows.size(); ++r) {
    std::copy_n(codes.begin() + r * source.cols() + cols.begin, cols.size(),
                block.codes.begin() + r * cols.size());
  }
  return block;
}

/// A tensor that holds one number.
const checkpoint::TensorInfo& find_number(const checkpoint::Checkpoint& files,
                                          const std::string& name) {
  const checkpoint::TensorInfo& tensor = files.at(name);
  const std::int64_t numbers =
      std::reduce(tensor.shape.begin(), tensor.shape.end(), std::int64_t{1}, std::multiplies<>());
  MOQ_CHECK(numbers == 1, files.directory().string(), ": ", name, " must hold one number, got ",
            numbers);
  return tensor;
}

/// How a quantized module was trained to read its input.
kernels::InputRounding trained_input(const checkpoint::Checkpoint& files, const std::string& module,
                                     InputMode mode) {
  const std::string where = files.directory().string() + ": ";
  kernels::InputRounding input{.mode = mode};
  if (is_static(mode)) {
    const checkpoint::TensorInfo& tensor = find_number(files, module + ".input_scale");
    input.scale = read_floats(files, tensor, {0, 1}).front();
    MOQ_CHECK(exists(grid_of_scale(input.scale, 8)), where, tensor.name,
              " must be finite and >= ", min_scale(DType::kFloat32), ", got ", input.scale);
  }
  const std::string zero_point = module + ".input_zero_point";
  if (mode == InputMode::kStaticAsymmetricInt8) {
    const checkpoint::TensorInfo& tensor = find_number(files, zero_point);
    MOQ_CHECK(tensor.dtype == "I8", where, zero_point, " must be I8, got ", tensor.dtype);
    input.zero_point = static_cast<std::int8_t>(files.bytes(zero_point).front());
  } else if (files.contains(zero_point)) {  // some writers put a 0 there
    const bool is_zero = std::ranges::all_of(files.bytes(zero_point),
                                             [](std::byte byte) { return byte == std::byte{0}; });
    MOQ_CHECK(is_zero, where, zero_point, " must be 0 or absent, got another number: ",
              "input_activations of config.json must say \"symmetric\": false and \"strategy\": ",
              "\"tensor\" for a zero point to be used");
  }
  return input;
}

std::string describe(const kernels::InputRounding& input) {
  std::string words = name_of(input.mode);
  if (is_static(input.mode)) {
    words += " with input_scale " + std::to_string(input.scale);
  }
  if (input.mode == InputMode::kStaticAsymmetricInt8) {
    words += " and input_zero_point " + std::to_string(input.zero_point);
  }
  return words;
}

/// How the projection reads its input: as the caller asked, or as all of its parts were trained.
void choose_input(Linear& linear, const checkpoint::Checkpoint& files, const Slices& slices,
                  const kernels::LinearShape& shape, const PackOptions& options) {
  if (!kernels::is_integer(shape.format)) {
    return;
  }
  if (options.input_mode.has_value()) {
    linear.input = {.mode = *options.input_mode};
    return;
  }
  const auto trained = [&](const RowSlice& slice) {
    const std::string& module = slice.source->name();
    return slice.source->quantized()
               ? trained_input(files, module, options.quantization.input_of(module))
               : kernels::InputRounding{};
  };
  linear.input = trained(slices.front());
  for (const RowSlice& slice : slices) {
    const kernels::InputRounding other = trained(slice);
    MOQ_CHECK(other == linear.input,
              "weights: projections that are computed together must read their input alike, got ",
              slices.front().source->name(), " (", describe(linear.input), ") and ",
              slice.source->name(), " (", describe(other), ")");
  }
}

/// Rows that one thread reads.
struct Chunk {
  const WeightSource* source;
  Range rows;          ///< of the source
  std::int64_t place;  ///< of the first of them in the weight
};

std::vector<Chunk> chunks_of(const Slices& slices) {
  std::vector<Chunk> chunks;
  std::int64_t place = 0;
  for (const RowSlice& slice : slices) {
    for (std::int64_t begin = slice.rows.begin; begin < slice.rows.end; begin += kRowsAtOnce) {
      const Range rows{begin, std::min(begin + kRowsAtOnce, slice.rows.end)};
      chunks.push_back({slice.source, rows, place});
      place += rows.size();
    }
  }
  return chunks;
}

/// Reads a chunk into a weight of floats.
void fill_floats(const Chunk& chunk, Range cols, UnpackedWeight& weight) {
  const WeightSource& source = *chunk.source;
  const WeightFormat format = weight.shape.format;
  std::byte* out = weight.rows.data() + chunk.place * weight.shape.k * kernels::bits_of(format) / 8;
  if (!source.quantized() && format_of(source.dtype()) == format) {
    source.copy_elements(chunk.rows, cols, out);
  } else {
    store(source.read_values(chunk.rows, cols), format, out);
  }
}

/// Reads a chunk into a weight of codes, whose numbers of all groups are 0 still.
void fill_codes(const Chunk& chunk, Range cols, UnpackedWeight& weight) {
  const WeightSource& source = *chunk.source;
  const kernels::LinearShape& shape = weight.shape;
  const std::int64_t per_row = kernels::num_groups(shape);
  const CodeBlock block = source.quantized() ? source.read_codes(chunk.rows, cols, shape.group_size)
                                             : quantize_rows(source, chunk.rows, cols);
  auto* const codes = reinterpret_cast<std::int8_t*>(weight.rows.data());
  std::copy(block.codes.begin(), block.codes.end(), codes + chunk.place * shape.k);
  auto scales = weight.scales.begin() + chunk.place * per_row;
  if (source.quantized()) {
    std::copy(block.scales.begin(), block.scales.end(), scales);
  } else {
    for (const float scale : block.scales) {  // one a row, here of all groups
      scales = std::fill_n(scales, per_row, scale);
    }
  }
  if (!block.zero_points.empty()) {
    std::copy(block.zero_points.begin(), block.zero_points.end(),
              weight.zero_points.begin() + chunk.place * per_row);
  }
}

/// Rows of `width` elements in a new order: row order[i] becomes row i.
template <typename T>
void reorder_rows(std::vector<T>& rows, std::size_t width, std::span<const std::int64_t> order) {
  if (rows.empty()) {
    return;
  }
  std::vector<T> reordered(rows.size());
  auto out = reordered.begin();
  for (const std::int64_t row : order) {
    const auto from = rows.begin() + row * static_cast<std::ptrdiff_t>(width);
    out = std::copy(from, from + static_cast<std::ptrdiff_t>(width), out);
  }
  rows = std::move(reordered);
}

}  // namespace

WeightFormat format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return WeightFormat::kFloat16;
    case DType::kBFloat16:
      return WeightFormat::kBFloat16;
    default:
      return WeightFormat::kFloat32;
  }
}

void store(std::span<const float> values, WeightFormat format, std::byte* out) {
  if (format == WeightFormat::kFloat32) {
    std::copy(values.begin(), values.end(), reinterpret_cast<float*>(out));
    return;
  }
  auto* half = reinterpret_cast<std::uint16_t*>(out);
  for (const float value : values) {
    *half++ = format == WeightFormat::kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
  }
}

kernels::PackLinearArgs UnpackedWeight::view(void* packed) const {
  return {.shape = shape,
          .weight = rows.data(),
          .row_stride = shape.k,
          .col_stride = 1,
          .scales = scales.data(),
          .zero_points = shape.asymmetric ? zero_points.data() : nullptr,
          .packed = packed};
}

StoredWeight pack_for_cpu(const UnpackedWeight& weight) {
  const std::size_t size = kernels::cpu::packed_linear_size(weight.shape);
  const auto storage = std::make_shared<AlignedBuffer>(size);
  kernels::cpu::pack_linear(weight.view(storage->data()));
  return {.weight = {.shape = weight.shape, .data = storage->data()},
          .storage = storage,
          .bytes = static_cast<std::int64_t>(size)};
}

kernels::LinearShape packed_shape(const std::vector<RowSlice>& slices, Range cols,
                                  const PackOptions& options) {
  kernels::LinearShape shape{.k = cols.size(), .group_size = cols.size()};
  bool integers = !options.floats.has_value();
  int num_bits = 0;
  WeightFormat floats = format_of(slices.front().source->dtype());
  for (const RowSlice& slice : slices) {
    const WeightSource& source = *slice.source;
    shape.n += slice.rows.size();
    integers = integers && (options.quantize || source.quantized());
    num_bits = std::max(num_bits, options.quantize ? 8 : source.num_bits());
    if (source.quantized() || format_of(source.dtype()) != floats) {
      floats = WeightFormat::kFloat32;
    }
    if (source.quantized()) {
      shape.asymmetric |= source.asymmetric();
      shape.group_size = std::gcd(shape.group_size, source.group_size_of(cols));
    }
  }
  if (integers) {
    shape.format = integer_format(num_bits);
    return shape;
  }
  shape.format = options.floats.value_or(floats);
  shape.asymmetric = false;
  shape.group_size = shape.k;
  return shape;
}

Linear pack_weights(const checkpoint::Checkpoint& files, const std::vector<RowSlice>& slices,
                    Range cols, std::span<const std::int64_t> order, const PackOptions& options) {
  UnpackedWeight weight{.shape = packed_shape(slices, cols, options)};
  const kernels::LinearShape& shape = weight.shape;
  const bool integers = kernels::is_integer(shape.format);
  const std::int64_t per_row = integers ? kernels::num_groups(shape) : 0;
  const auto element = static_cast<std::size_t>(integers ? 1 : kernels::bits_of(shape.format) / 8);
  const auto row_bytes = static_cast<std::size_t>(shape.k) * element;
  weight.rows.resize(static_cast<std::size_t>(shape.n) * row_bytes);
  weight.scales.resize(static_cast<std::size_t>(shape.n * per_row));
  weight.zero_points.resize(shape.asymmetric ? weight.scales.size() : 0);
  const std::vector<Chunk> chunks = chunks_of(slices);
  kernels::parallel_for(
      static_cast<std::int64_t>(chunks.size()), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const Chunk& chunk = chunks[static_cast<std::size_t>(i)];
          integers ? fill_codes(chunk, cols, weight) : fill_floats(chunk, cols, weight);
        }
      });
  Linear linear;
  for (const RowSlice& slice : slices) {
    if (slice.bias != nullptr) {
      const std::vector<float> bias = read_floats(files, *slice.bias, slice.rows);
      linear.bias.insert(linear.bias.end(), bias.begin(), bias.end());
    }
  }
  if (!order.empty()) {
    reorder_rows(weight.rows, row_bytes, order);
    reorder_rows(weight.scales, static_cast<std::size_t>(per_row), order);
    reorder_rows(weight.zero_points, static_cast<std::size_t>(per_row), order);
    reorder_rows(linear.bias, 1, order);
  }
  choose_input(linear, files, slices, shape, options);
  linear.stored = options.pack(weight);
  return linear;
}

}  // namespace moq::inference
