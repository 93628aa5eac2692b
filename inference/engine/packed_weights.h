#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "inference/checkpoint/checkpoint.h"
#include "inference/engine/quantization_config.h"
#include "inference/engine/weight_source.h"
#include "inference/parallel/sharding.h"
#include "kernels/linear.h"

namespace moq::inference {

/// A projection's numbers in the order of its rows, in host memory.
struct UnpackedWeight {
  kernels::LinearShape shape;
  std::vector<std::byte> rows = {};  ///< [n, k]: codes as int8, or values of the float format
  std::vector<float> scales = {};    ///< [n, num_groups]; integer formats
  std::vector<std::int32_t> zero_points = {};  ///< [n, num_groups]; asymmetric ones

  kernels::PackLinearArgs view(void* packed) const;
};

/// A packed weight and the memory that it lies in.
struct StoredWeight {
  kernels::PackedLinear weight;
  std::shared_ptr<const void> storage;
  std::int64_t bytes = 0;
};

/// Packs a weight for the kernels of one device, into memory of that device.
using Packer = std::function<StoredWeight(const UnpackedWeight& weight)>;

/// The packer for CPU kernels.
StoredWeight pack_for_cpu(const UnpackedWeight& weight);

/// The format of floats of a dtype.
kernels::WeightFormat format_of(DType dtype);
/// Writes values in the storage of a float format.
void store(std::span<const float> values, kernels::WeightFormat format, std::byte* out);

/// A packed projection of this rank.
struct Linear {
  StoredWeight stored;
  std::vector<float> bias;       ///< [n], or empty
  kernels::InputRounding input;  ///< how the product reads its input

  const kernels::PackedLinear& weight() const { return stored.weight; }
  const kernels::LinearShape& shape() const { return stored.weight.shape; }
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
  const QuantizationConfig& quantization;  ///< how quantized weights read their input
  std::optional<kernels::WeightFormat> floats = std::nullopt;  ///< floats of it; nullopt: as stored
  bool quantize = false;  ///< floats become INT8 codes, one scale a row
  /// How every integer weight reads its input; nullopt: as it was trained
  std::optional<kernels::InputMode> input_mode = std::nullopt;
  Packer pack = pack_for_cpu;
};

/// Shape of what pack_weights makes of the same: siblings that differ meet in the wider form, which
/// holds both exactly.
kernels::LinearShape packed_shape(const std::vector<RowSlice>& slices, Range cols,
                                  const PackOptions& options);

/// Reads columns `cols` of the slices' rows, one below the other, puts them in the order given
/// (order[i]: the row that becomes row i; empty: as they are), and packs them. No more than the
/// asked-for part is read, except where columns are split and the scales are yet to be computed: a
/// scale needs its whole row.
/// @throws moq::Error naming the tensor for numbers that are not finite or don't fit their format,
///         or if the slices disagree on how they read their input
Linear pack_weights(const checkpoint::Checkpoint& files, const std::vector<RowSlice>& slices,
                    Range cols, std::span<const std::int64_t> order, const PackOptions& options);

}  // namespace moq::inference
