#include "inference/engine/weights.h"

#include <algorithm>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

// Cuts of the feed-forward columns and of the vocabulary: a multiple of every kernel's vector
// width.
constexpr std::int64_t kShardAlignment = 64;

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
  table.cols = source.cols();
  const std::byte* mapped = source.plain_rows();
  if (mapped != nullptr &&
      reinterpret_cast<std::uintptr_t>(mapped) % size_of(source.dtype()) == 0) {
    table.view = {.data = mapped, .dtype = source.dtype(), .num_rows = source.rows()};
  } else {
    table.source = source;
  }
  return table;
}

std::optional<kernels::WeightFormat> float_format(WeightDtype dtype) {
  switch (dtype) {
    case WeightDtype::kFloat32:
      return kernels::WeightFormat::kFloat32;
    case WeightDtype::kFloat16:
      return kernels::WeightFormat::kFloat16;
    case WeightDtype::kBFloat16:
      return kernels::WeightFormat::kBFloat16;
    default:
      return std::nullopt;
  }
}

bool is_layer_projection(Module module) {
  switch (module) {
    case Module::kQkv:
    case Module::kQuery:
    case Module::kKey:
    case Module::kValue:
    case Module::kAttentionOut:
    case Module::kGateUp:
    case Module::kGate:
    case Module::kUp:
    case Module::kDown:
      return true;
    default:
      return false;
  }
}

/// Whether projections of the layers are stored as integers.
bool has_quantized_layers(const ParameterMap& parameters) {
  return std::ranges::any_of(parameters.modules(), [](const auto& entry) {
    const auto& [key, module] = entry;
    return is_layer_projection(key.first) && module.matrix.has_value() &&
           module.matrix->quantized();
  });
}

/// Whether floats of a projection are rounded to INT8.
bool quantizes(Module module, const LoadOptions& options, bool quantized_layers) {
  if (options.dtype != WeightDtype::kInt8) {
    return false;
  }
  return module == Module::kHead ? options.quantize_head.value_or(!quantized_layers)
                                 : is_layer_projection(module) && !quantized_layers;
}

class Loader {
 public:
  /// @param outline  reads and packs no projections, but finds their shapes
  Loader(const ParameterMap& parameters, const checkpoint::Checkpoint& files,
         const LoadOptions& options, bool outline = false)
      : parameters_(parameters),
        files_(files),
        options_(options),
        outline_(outline),
        spec_(parameters.spec()) {}

  Weights load();

 private:
  void shard(Weights& weights) const;
  Layer load_layer(std::int64_t layer, const Weights& weights) const;
  std::vector<RowSlice> qkv_slices(std::int64_t layer, const HeadShard& heads) const;
  std::vector<RowSlice> up_slices(std::int64_t layer, Range ffn) const;
  Linear load_linear(const std::vector<RowSlice>& slices, Range cols, bool quantize,
                     std::span<const std::int64_t> order = {}) const;
  std::vector<std::int64_t> qkv_order(const HeadShard& heads) const;
  std::vector<std::int64_t> up_order(Range ffn) const;
  Linear load_whole(Module module) const;
  Linear load_head(const Weights& weights) const;

  const ParameterMap& parameters_;
  const checkpoint::Checkpoint& files_;
  const LoadOptions& options_;
  const bool outline_;
  const ModelSpec& spec_;
  const bool has_quantized_layers_ = has_quantized_layers(parameters_);
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
  const bool quantize = quantizes(Module::kDown, options_, has_quantized_layers_);
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
      .qkv =
          load_linear(qkv_slices(layer, weights.heads), hidden, quantize, qkv_order(weights.heads)),
      .query_norm = norm(Module::kQueryNorm),
      .key_norm = norm(Module::kKeyNorm),
      .attention_out = row_parallel(Module::kAttentionOut, q_cols),
      .ffn_norm = norm(Module::kFfnNorm),
      .up = load_linear(up_slices(layer, weights.ffn), hidden, quantize, up_order(weights.ffn)),
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

std::vector<std::int64_t> Loader::qkv_order(const HeadShard& heads) const {
  if (!options_.pair_rows || !rotates_in_pairs(spec_)) {
    return {};
  }
  const std::int64_t rotated = heads.query_heads.size() + heads.kv_heads.size();
  return paired_head_rows(rotated + heads.kv_heads.size(), rotated, spec_.head_dim,
                          spec_.rotary_dim());
}

std::vector<std::int64_t> Loader::up_order(Range ffn) const {
  return options_.pair_rows && spec_.gated ? paired_gate_rows(ffn.size())
                                           : std::vector<std::int64_t>{};
}

Linear Loader::load_linear(const std::vector<RowSlice>& slices, Range cols, bool quantize,
                           std::span<const std::int64_t> order) const {
  const PackOptions pack{.quantization = options_.quantization,
                         .floats = float_format(options_.dtype),
                         .quantize = quantize,
                         .input_mode = options_.input_mode,
                         .pack = options_.pack};
  if (outline_) {
    Linear linear;
    linear.stored.weight.shape = packed_shape(slices, cols, pack);
    return linear;
  }
  return pack_weights(files_, slices, cols, order, pack);
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
  const bool quantize =
      !source.quantized() && quantizes(Module::kHead, options_, has_quantized_layers_);
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

Weights outline_weights(const ParameterMap& parameters, const checkpoint::Checkpoint& files,
                        const LoadOptions& options) {
  return Loader(parameters, files, options, /*outline=*/true).load();
}

bool rotates_in_pairs(const ModelSpec& spec) {
  return spec.positions == PositionKind::kRotary && !spec.qk_norm && spec.head_dim % 2 == 0;
}

std::vector<std::int64_t> paired_gate_rows(std::int64_t columns) {
  std::vector<std::int64_t> order;
  for (std::int64_t column = 0; column < columns; ++column) {
    order.insert(order.end(), {column, columns + column});
  }
  return order;
}

std::vector<std::int64_t> paired_head_rows(std::int64_t num_heads, std::int64_t num_rotated,
                                           std::int64_t head_dim, std::int64_t rotary_dim) {
  std::vector<std::int64_t> order;
  for (std::int64_t head = 0; head < num_heads; ++head) {
    const std::int64_t first = head * head_dim;
    const std::int64_t half = head < num_rotated ? rotary_dim / 2 : 0;
    for (std::int64_t i = 0; i < half; ++i) {
      order.insert(order.end(), {first + i, first + half + i});
    }
    for (std::int64_t i = 2 * half; i < head_dim; ++i) {
      order.push_back(first + i);
    }
  }
  return order;
}

std::int64_t weight_bytes(const Weights& weights) {
  std::int64_t total = 0;
  for_each_linear(weights, [&](const Linear& linear) {
    total += linear.stored.bytes + static_cast<std::int64_t>(linear.bias.size() * sizeof(float));
  });
  return total;
}

}  // namespace moq::inference
