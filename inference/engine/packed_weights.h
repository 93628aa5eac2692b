#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "inference/checkpoint/checkpoint.h"
#include "inference/engine/aligned_buffer.h"
#include "inference/engine/quantization_config.h"
#include "inference/engine/weight_source.h"
#include "inference/parallel/sharding.h"
#include "kernels/linear.h"

namespace moq::inference {

/// A packed projection of this rank.
struct Linear {
  kernels::PackedLinear weight;  ///< a view of `storage`
  AlignedBuffer storage;
  std::vector<float> bias;  ///< [n], or empty
  kernels::InputMode input_mode = kernels::InputMode::kFloat32;

  const float* bias_or_null() const { return bias.empty() ? nullptr : bias.data(); }
};

/// Consecutive rows of one source; a fused projection is a list of them.
struct RowSlice {
  const WeightSource* source;
  Range rows;
  const checkpoint::TensorInfo* bias;  ///< of the whole source; null: none
};

/// How weights of a checkpoint become packed ones.
struct PackOptions {
  const QuantizationConfig& quantization;  ///< which quantized weights read INT8 activations
  std::optional<kernels::WeightFormat> floats = std::nullopt;  ///< floats of it; nullopt: as stored
  bool quantize = false;             ///< floats become INT8 codes, one scale a row
  bool dynamic_activations = false;  ///< every integer weight reads INT8 activations
};

/// Reads columns `cols` of the slices' rows, one below the other, and packs them. Siblings that
/// differ meet in the wider form, which holds both exactly. No more than the asked-for part is
/// read, except where columns are split and the scales are yet to be computed: a scale needs its
/// whole row.
/// @throws moq::Error naming the tensor for numbers that are not finite or don't fit their format,
///         or if the slices disagree on INT8 activations
Linear pack_weights(const checkpoint::Checkpoint& files, const std::vector<RowSlice>& slices,
                    Range cols, const PackOptions& options);

}  // namespace moq::inference
