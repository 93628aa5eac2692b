#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "inference/checkpoint/checkpoint.h"
#include "inference/engine/model_spec.h"
#include "inference/engine/packed_weights.h"
#include "inference/engine/quantization_config.h"
#include "inference/engine/weight_source.h"
#include "inference/parallel/sharding.h"
#include "inference/policies/parameter_map.h"
#include "kernels/embedding.h"

namespace moq::inference {

struct Norm {
  std::vector<float> weight;  ///< [hidden_size]
  std::vector<float> bias;    ///< the same, or empty
};

/// A lookup table, whole on every rank: it lies in the mapped file, which the ranks of a host
/// share, and a rank reads the rows of its tokens only. Splitting it would save no memory and cost
/// an all-reduce a step.
struct Table {
  kernels::EmbeddingTable view{};      ///< rows that kernels can read where they lie
  std::optional<WeightSource> source;  ///< of any other form: rows are converted as they are read
  std::int64_t cols = 0;               ///< hidden_size

  std::int64_t rows() const { return source.has_value() ? source->rows() : view.num_rows; }
};

struct Layer {
  Norm attention_norm;
  Linear qkv;  ///< rows of q, then k, then v of this rank's heads; see LoadOptions::pair_rows
  Norm query_norm;
  Norm key_norm;
  Linear attention_out;
  Norm ffn_norm;
  Linear up;  ///< gated: rows of gate, then of up; see LoadOptions::pair_rows
  Linear down;
};

/// The part of a model that one rank computes with.
struct Weights {
  HeadShard heads;
  Range ffn;                               ///< columns of the feed-forward block
  std::vector<std::int64_t> vocab_widths;  ///< rows of the head on each rank

  Table token_embedding;
  Table position_embedding;
  Table token_type_embedding;
  Norm embedding_norm;
  std::vector<Layer> layers;
  Norm final_norm;
  Linear head_dense;
  Norm head_norm;
  Linear head;
  Linear pooler;
  Linear classifier;

  std::shared_ptr<const checkpoint::Checkpoint> files;  ///< keeps the mapped tables alive
};

/// What the projections are kept in.
enum class WeightDtype : std::uint8_t {
  kAsStored,  ///< codes as codes, floats in their own dtype
  kInt8,  ///< a quantized checkpoint as stored; of any other, the layers' projections and the head
          ///< are quantized: 8 bits, symmetric, one scale per output feature
  kFloat32,
  kFloat16,
  kBFloat16,
};

/// Parses "int8", "fp32", "fp16", "bf16". @throws moq::Error for another name.
WeightDtype parse_weight_dtype(std::string_view name);

struct LoadOptions {
  WeightDtype dtype = WeightDtype::kAsStored;
  /// Whether kInt8 quantizes a head that is stored as floats; nullopt: unless the checkpoint is a
  /// quantized one, which is taken as it is.
  std::optional<bool> quantize_head = std::nullopt;
  /// How every integer weight reads its input; nullopt: as it was trained
  std::optional<kernels::InputMode> input_mode = std::nullopt;
  Packer pack = pack_for_cpu;
  /// Puts rows that a kernel finishes together side by side: gate and up of a column, and the two
  /// dimensions of a head that a rotation mixes (DeviceLinearArgs::gated, DeviceQkvOutput::rotary).
  bool pair_rows = false;
  QuantizationConfig quantization = {};  ///< of the checkpoint
  int rank = 0;
  int size = 1;
};

/// Reads and packs one rank's share.
/// @throws moq::Error if `size` exceeds the number of attention heads, naming the largest that
/// works
Weights load_weights(const ParameterMap& parameters,
                     std::shared_ptr<const checkpoint::Checkpoint> files,
                     const LoadOptions& options);

/// What load_weights would load, without the numbers of projections: their shapes say what they
/// would take.
/// @throws moq::Error as load_weights for `size`
Weights outline_weights(const ParameterMap& parameters, const checkpoint::Checkpoint& files,
                        const LoadOptions& options);

/// Whether the rotation is left to the projection's kernel (LoadOptions::pair_rows): not where each
/// head is normalised before it, or has no pairs.
bool rotates_in_pairs(const ModelSpec& spec);

/// Rows of the up projection with gate and up of each of `columns` columns side by side.
std::vector<std::int64_t> paired_gate_rows(std::int64_t columns);

/// Rows of `num_heads` heads, of which the first `num_rotated` have the two dimensions that a
/// rotation mixes side by side.
std::vector<std::int64_t> paired_head_rows(std::int64_t num_heads, std::int64_t num_rotated,
                                           std::int64_t head_dim, std::int64_t rotary_dim);

/// Calls visit(linear) for every projection.
template <typename AnyWeights, typename Visit>
void for_each_linear(AnyWeights& weights, const Visit& visit) {
  for (auto& layer : weights.layers) {
    visit(layer.qkv);
    visit(layer.attention_out);
    visit(layer.up);
    visit(layer.down);
  }
  visit(weights.head_dense);
  visit(weights.head);
  visit(weights.pooler);
  visit(weights.classifier);
}

/// Bytes of a rank's packed projections and their biases.
std::int64_t weight_bytes(const Weights& weights);

}  // namespace moq::inference
