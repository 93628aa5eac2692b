#include "inference/engine/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "kernels/common/check.h"
#include "kernels/common/half.h"
#include "kernels/fake_quantize.h"

namespace moq::inference {
namespace {

using kernels::WeightFormat;

// Cuts of the feed-forward columns and of the vocabulary: a multiple of every kernel's vector
// width.
constexpr std::int64_t kShardAlignment = 64;
// Rows read and converted at once; bounds what loading needs beside the packed weights.
constexpr std::int64_t kRowsAtOnce = 512;

/// Consecutive rows of one source; a fused projection is a list of them.
struct RowSlice {
  const WeightSource* source;
  Range rows;
  const checkpoint::TensorInfo* bias;  ///< of the whole source; null: none
};

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

WeightFormat integer_format(int num_bits) {
  return num_bits > 4   ? WeightFormat::kInt8
         : num_bits > 2 ? WeightFormat::kInt4
                        : WeightFormat::kInt2;
}

/// Codes and scales of a float matrix's block, quantized to 8 bits per output feature.
CodeBlock quantize_rows(const WeightSource& source, Range rows, Range cols) {
  // Scales belong to whole rows, so whole rows are read even where a part of the columns is kept.
  const std::vector<float> values = source.read_values(rows, {0, source.cols()});
  std::vector<std::int8_t> codes(values.size());
  std::vector<float> stored_scales(static_cast<std::size_t>(rows.size()));
  const kernels::FakeQuantizeTensor tensor{.input = values.data(),
                                           .codes = codes.data(),
                                           .scales = stored_scales.data(),
                                           .rows = rows.size(),
                                           .cols = source.cols(),
                                           .row_stride = source.cols(),
                                           .col_stride = 1,
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
    std::memcpy(block.codes.data() + r * cols.size(), codes.data() + r * source.cols() + cols.begin,
                static_cast<std::size_t>(cols.size()));
  }
  return block;
}

/// Values in the storage of a float format.
void store(std::span<const float> values, WeightFormat format, std::byte* out) {
  if (format == WeightFormat::kFloat32) {
    std::memcpy(out, values.data(), values.size_bytes());
    return;
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t bits = format == WeightFormat::kFloat16 ? float_to_float16(values[i])
                                                                : float_to_bfloat16(values[i]);
    std::memcpy(out + 2 * i, &bits, sizeof(bits));
  }
}

Norm load_norm(const checkpoint::Checkpoint& files, const ModuleParameters* parameters) {
  Norm norm;
  if (parameters != nullptr) {
    const Range all{0, parameters->vector->shape[0]};
    norm.weight = read_floats(files, *parameters->vector, all);
    if (parameters->bias != nullptr) {
      norm.bias = read_floats(files, *parameters->bias, all);
    }
  }
  return norm;
}

Table load_table(const ModuleParameters* parameters) {
  Table table;
  if (parameters == nullptr) {
    return table;
  }
  const WeightSource& source = *parameters->matrix;
  const Range rows{0, source.rows()};
  const Range cols{0, source.cols()};
  table.view = {.data = nullptr, .num_rows = source.rows(), .total_rows = source.rows()};
  if (source.quantized()) {
    CodeBlock block = source.read_codes(rows, cols, source.group_size());
    table.data = AlignedBuffer(block.codes.size());
    std::memcpy(table.data.data(), block.codes.data(), block.codes.size());
    table.scales = std::move(block.scales);
    table.zero_points = std::move(block.zero_points);
    table.view.data = table.data.data();
    table.view.dtype = DType::kInt8;
    table.view.scales = table.scales.data();
    table.view.zero_points = table.zero_points.empty() ? nullptr : table.zero_points.data();
    table.view.group_size = source.group_size();
    return table;
  }
  const std::byte* mapped = source.plain_rows();
  if (mapped != nullptr &&
      reinterpret_cast<std::uintptr_t>(mapped) % size_of(source.dtype()) == 0) {
    table.view.data = mapped;
    table.view.dtype = source.dtype();
    return table;
  }
  const std::vector<float> values = source.read_values(rows, cols);
  table.data = AlignedBuffer(values.size() * sizeof(float));
  std::memcpy(table.data.data(), values.data(), table.data.size());
  table.view.data = table.data.data();
  table.view.dtype = DType::kFloat32;
  return table;
}

class Loader {
 public:
  Loader(const ParameterMap& parameters, const checkpoint::Checkpoint& files,
         const LoadOptions& options)
      : parameters_(parameters), files_(files), options_(options), spec_(parameters.spec()) {}

  Weights load();

 private:
  void shard(Weights& weights) const;
  Layer load_layer(std::int64_t layer, const Weights& weights) const;
  std::vector<RowSlice> qkv_slices(std::int64_t layer, const HeadShard& heads) const;
  std::vector<RowSlice> up_slices(std::int64_t layer, Range ffn) const;
  Linear load_linear(const std::vector<RowSlice>& slices, Range cols, bool quantize) const;
  Linear load_whole(Module module) const;
  Linear load_head(const Weights& weights) const;
  kernels::InputMode input_mode_of(const std::vector<RowSlice>& slices,
                                   const kernels::LinearShape& shape) const;
  kernels::LinearShape shape_of(const std::vector<RowSlice>& slices, Range cols,
                                bool quantize) const;

  const ParameterMap& parameters_;
  const checkpoint::Checkpoint& files_;
  const LoadOptions& options_;
  const ModelSpec& spec_;
  bool quantized_checkpoint_ = false;
};

void Loader::shard(Weights& weights) const {
  weights.heads = shard_heads(spec_.num_heads, spec_.num_kv_heads, options_.rank, options_.size);
  weights.ffn = shard_range(spec_.intermediate_size, kShardAlignment, options_.rank, options_.size);
  for (int rank = 0; rank < options_.size; ++rank) {
    weights.vocab_widths.push_back(
        shard_range(spec_.vocab_size, kShardAlignment, rank, options_.size).size());
  }
}

Weights Loader::load() {
  Weights weights;
  shard(weights);
  for (std::int64_t layer = 0; layer < spec_.num_layers; ++layer) {
    quantized_checkpoint_ |= parameters_.at(Module::kDown, layer).matrix->quantized() ||
                             parameters_.at(Module::kAttentionOut, layer).matrix->quantized() ||
                             qkv_slices(layer, weights.heads).front().source->quantized();
  }
  weights.token_embedding = load_table(parameters_.find(Module::kTokenEmbedding));
  weights.position_embedding = load_table(parameters_.find(Module::kPositionEmbedding));
  weights.token_type_embedding = load_table(parameters_.find(Module::kTokenTypeEmbedding));
  weights.embedding_norm = load_norm(files_, parameters_.find(Module::kEmbeddingNorm));
  weights.layers.reserve(static_cast<std::size_t>(spec_.num_layers));
  for (std::int64_t layer = 0; layer < spec_.num_layers; ++layer) {
    weights.layers.push_back(load_layer(layer, weights));
  }
  weights.final_norm = load_norm(files_, parameters_.find(Module::kFinalNorm));
  weights.head_dense = load_whole(Module::kHeadDense);
  weights.head_norm = load_norm(files_, parameters_.find(Module::kHeadNorm));
  weights.head = load_head(weights);
  weights.pooler = load_whole(Module::kPooler);
  weights.classifier = load_whole(Module::kClassifier);
  return weights;
}

Layer Loader::load_layer(std::int64_t layer, const Weights& weights) const {
  const bool quantize = options_.dtype == WeightDtype::kInt8 && !quantized_checkpoint_;
  const auto norm = [&](Module module) {
    return load_norm(files_, parameters_.find(module, layer));
  };
  const auto row_parallel = [&](Module module, Range cols) {
    const ModuleParameters& source = parameters_.at(module, layer);
    return load_linear({{&*source.matrix, {0, source.matrix->rows()}, source.bias}}, cols,
                       quantize);
  };
  const Range q_cols{weights.heads.query_heads.begin * spec_.head_dim,
                     weights.heads.query_heads.end * spec_.head_dim};
  const Range hidden{0, spec_.hidden_size};
  return {
      .attention_norm = norm(Module::kAttentionNorm),
      .qkv = load_linear(qkv_slices(layer, weights.heads), hidden, quantize),
      .query_norm = norm(Module::kQueryNorm),
      .key_norm = norm(Module::kKeyNorm),
      .attention_out = row_parallel(Module::kAttentionOut, q_cols),
      .ffn_norm = norm(Module::kFfnNorm),
      .up = load_linear(up_slices(layer, weights.ffn), hidden, quantize),
      .down = row_parallel(Module::kDown, weights.ffn),
  };
}

std::vector<RowSlice> Loader::qkv_slices(std::int64_t layer, const HeadShard& heads) const {
  const std::int64_t dim = spec_.head_dim;
  const auto rows = [&](Range range, std::int64_t first) {
    return Range{first + range.begin * dim, first + range.end * dim};
  };
  const ModuleParameters* fused = parameters_.find(Module::kQkv, layer);
  if (fused == nullptr) {
    const ModuleParameters& query = parameters_.at(Module::kQuery, layer);
    const ModuleParameters& key = parameters_.at(Module::kKey, layer);
    const ModuleParameters& value = parameters_.at(Module::kValue, layer);
    return {{&*query.matrix, rows(heads.query_heads, 0), query.bias},
            {&*key.matrix, rows(heads.kv_heads, 0), key.bias},
            {&*value.matrix, rows(heads.kv_heads, 0), value.bias}};
  }
  const QkvShape shape{spec_.num_heads, spec_.num_kv_heads, dim};
  std::vector<RowSlice> slices;
  for (const Range& run : runs_of(qkv_rows(fused->order, shape, heads))) {
    slices.push_back({&*fused->matrix, run, fused->bias});
  }
  return slices;
}

std::vector<RowSlice> Loader::up_slices(std::int64_t layer, Range ffn) const {
  if (const ModuleParameters* fused = parameters_.find(Module::kGateUp, layer)) {
    const std::int64_t up_row = spec_.intermediate_size;
    return {{&*fused->matrix, ffn, fused->bias},
            {&*fused->matrix, {up_row + ffn.begin, up_row + ffn.end}, fused->bias}};
  }
  std::vector<RowSlice> slices;
  if (const ModuleParameters* gate = parameters_.find(Module::kGate, layer)) {
    slices.push_back({&*gate->matrix, ffn, gate->bias});
  }
  const ModuleParameters& up = parameters_.at(Module::kUp, layer);
  slices.push_back({&*up.matrix, ffn, up.bias});
  return slices;
}

/// Form of the packed weight: siblings that differ meet in the wider form, which holds both
/// exactly.
kernels::LinearShape Loader::shape_of(const std::vector<RowSlice>& slices, Range cols,
                                      bool quantize) const {
  kernels::LinearShape shape{.k = cols.size(), .group_size = cols.size()};
  bool integers = options_.dtype == WeightDtype::kAsStored || options_.dtype == WeightDtype::kInt8;
  int num_bits = 0;
  WeightFormat floats = format_of(slices.front().source->dtype());
  for (const RowSlice& slice : slices) {
    const WeightSource& source = *slice.source;
    shape.n += slice.rows.size();
    integers = integers && (quantize || source.quantized());
    num_bits = std::max(num_bits, quantize ? 8 : source.num_bits());
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
  switch (options_.dtype) {
    case WeightDtype::kFloat32:
      shape.format = WeightFormat::kFloat32;
      break;
    case WeightDtype::kFloat16:
      shape.format = WeightFormat::kFloat16;
      break;
    case WeightDtype::kBFloat16:
      shape.format = WeightFormat::kBFloat16;
      break;
    default:
      shape.format = floats;
  }
  shape.asymmetric = false;
  shape.group_size = shape.k;
  return shape;
}

/// How the projection reads its input: as the caller asked, or as all of its parts were trained.
kernels::InputMode Loader::input_mode_of(const std::vector<RowSlice>& slices,
                                         const kernels::LinearShape& shape) const {
  if (!kernels::is_integer(shape.format)) {
    return kernels::InputMode::kFloat32;
  }
  bool dynamic = options_.dynamic_activations;
  if (!dynamic && options_.int_quantized_is_dynamic) {
    const auto trained = [](const RowSlice& slice) {
      return slice.source->quantized() && !slice.source->packed();
    };
    dynamic = trained(slices.front());
    for (const RowSlice& slice : slices) {
      MOQ_CHECK(trained(slice) == dynamic,
                "weights: projections that are computed together must "
                "agree on INT8 activations, got ",
                slices.front().source->name(), " and ", slice.source->name());
    }
  }
  return dynamic ? kernels::InputMode::kDynamicInt8 : kernels::InputMode::kFloat32;
}

Linear Loader::load_linear(const std::vector<RowSlice>& slices, Range cols, bool quantize) const {
  const kernels::LinearShape shape = shape_of(slices, cols, quantize);
  const bool integers = kernels::is_integer(shape.format);
  const auto element = static_cast<std::size_t>(integers ? 1 : kernels::bits_of(shape.format) / 8);
  const auto row_bytes = static_cast<std::size_t>(shape.k) * element;
  AlignedBuffer rows(static_cast<std::size_t>(shape.n) * row_bytes);
  std::vector<float> scales;
  std::vector<std::int32_t> zero_points;
  Linear linear;
  std::byte* out = rows.data();
  for (const RowSlice& slice : slices) {
    for (std::int64_t begin = slice.rows.begin; begin < slice.rows.end; begin += kRowsAtOnce) {
      const Range part{begin, std::min(begin + kRowsAtOnce, slice.rows.end)};
      const auto size = static_cast<std::size_t>(part.size()) * row_bytes;
      if (!integers) {
        store(slice.source->read_values(part, cols), shape.format, out);
      } else {
        CodeBlock block = slice.source->quantized()
                              ? slice.source->read_codes(part, cols, shape.group_size)
                              : quantize_rows(*slice.source, part, cols);
        std::memcpy(out, block.codes.data(), size);
        const std::int64_t per_row = kernels::num_groups(shape);
        if (!slice.source->quantized() && per_row > 1) {
          for (const float scale : block.scales) {
            scales.insert(scales.end(), static_cast<std::size_t>(per_row), scale);
          }
        } else {
          scales.insert(scales.end(), block.scales.begin(), block.scales.end());
        }
        if (shape.asymmetric) {
          block.zero_points.resize(static_cast<std::size_t>(part.size() * per_row), 0);
          zero_points.insert(zero_points.end(), block.zero_points.begin(), block.zero_points.end());
        }
      }
      out += size;
    }
    if (slice.bias != nullptr) {
      const std::vector<float> bias = read_floats(files_, *slice.bias, slice.rows);
      linear.bias.insert(linear.bias.end(), bias.begin(), bias.end());
    }
  }
  linear.input_mode = input_mode_of(slices, shape);
  linear.storage = AlignedBuffer(kernels::cpu::packed_linear_size(shape));
  linear.weight = {.shape = shape, .data = linear.storage.data()};
  kernels::cpu::pack_linear({.shape = shape,
                             .weight = rows.data(),
                             .row_stride = shape.k,
                             .col_stride = 1,
                             .scales = scales.data(),
                             .zero_points = shape.asymmetric ? zero_points.data() : nullptr,
                             .packed = linear.storage.data()});
  return linear;
}

/// A small projection that every rank computes whole.
Linear Loader::load_whole(Module module) const {
  const ModuleParameters* source = parameters_.find(module);
  if (source == nullptr) {
    return {};
  }
  return load_linear({{&*source->matrix, {0, source->matrix->rows()}, source->bias}},
                     {0, source->matrix->cols()}, /*quantize=*/false);
}

Linear Loader::load_head(const Weights& weights) const {
  if (!spec_.has_head) {
    return {};
  }
  const ModuleParameters& head = parameters_.at(Module::kHead);
  const WeightSource& source =
      head.matrix.has_value() ? *head.matrix : *parameters_.at(Module::kTokenEmbedding).matrix;
  const bool quantize = options_.dtype == WeightDtype::kInt8 && !source.quantized() &&
                        options_.quantize_head.value_or(!quantized_checkpoint_);
  Range rows{0, 0};
  for (int rank = 0; rank <= options_.rank; ++rank) {
    rows = {rows.end, rows.end + weights.vocab_widths[static_cast<std::size_t>(rank)]};
  }
  return load_linear({{&source, rows, head.bias}}, {0, spec_.hidden_size}, quantize);
}

}  // namespace

WeightDtype parse_weight_dtype(std::string_view name) {
  if (name == "int8") {
    return WeightDtype::kInt8;
  }
  if (name == "fp32") {
    return WeightDtype::kFloat32;
  }
  if (name == "fp16") {
    return WeightDtype::kFloat16;
  }
  MOQ_CHECK(name == "bf16", "engine: dtype must be int8, fp32, fp16 or bf16, got ", name);
  return WeightDtype::kBFloat16;
}

Weights load_weights(const ParameterMap& parameters,
                     std::shared_ptr<const checkpoint::Checkpoint> files,
                     const LoadOptions& options) {
  Weights weights = Loader(parameters, *files, options).load();
  weights.files = std::move(files);
  return weights;
}

std::int64_t weight_bytes(const Weights& weights) {
  std::int64_t total = 0;
  const auto add = [&](const Linear& linear) {
    total += static_cast<std::int64_t>(linear.storage.size() + linear.bias.size() * sizeof(float));
  };
  for (const Layer& layer : weights.layers) {
    add(layer.qkv);
    add(layer.attention_out);
    add(layer.up);
    add(layer.down);
  }
  for (const Linear* linear :
       {&weights.head_dense, &weights.head, &weights.pooler, &weights.classifier}) {
    add(*linear);
  }
  return total;
}

}  // namespace moq::inference
