#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "inference/engine/model_spec.h"
#include "inference/engine/weights.h"
#include "kernels/embedding.h"
#include "kernels/linear.h"
#include "kernels/norm.h"

namespace moq::inference::cuda {

/// Packs for the GPU's kernels, into memory of the current device.
StoredWeight pack_for_cuda(const UnpackedWeight& weight);

/// A packed projection and its bias on the device.
struct DeviceProjection {
  kernels::PackedLinear weight;
  const void* bias = nullptr;    ///< [n], of the activations' dtype; null: none
  kernels::InputRounding input;  ///< how the product reads its input
  bool splits_input = false;     ///< each rank has a part of the input (row-parallel)
  kernels::PackedLinear next;    ///< what is multiplied after it; null: another thing
};

struct DeviceLayer {
  kernels::DeviceNorm attention_norm;
  DeviceProjection qkv;
  kernels::DeviceNorm query_norm;
  kernels::DeviceNorm key_norm;
  DeviceProjection attention_out;
  kernels::DeviceNorm ffn_norm;
  DeviceProjection up;
  DeviceProjection down;
};

/// What the kernels read of a rank's weights: views of the packed projections of a `Weights`, and
/// copies of the rest on the current device.
class DeviceWeights {
 public:
  /// @param dtype  of the activations, which tables and biases are rounded to
  DeviceWeights(const ModelSpec& spec, const Weights& weights, DType dtype);

  /// Bytes of the copies.
  std::int64_t bytes() const { return bytes_; }
  /// Copies numbers to the device as float32 and keeps them.
  const float* keep(const std::vector<float>& values);

  kernels::DeviceEmbeddingLookup token_embedding;
  kernels::DeviceEmbeddingLookup position_embedding;
  kernels::DeviceEmbeddingLookup token_type_embedding;
  kernels::DeviceNorm embedding_norm;
  std::vector<DeviceLayer> layers;
  kernels::DeviceNorm final_norm;  ///< of the last layer, where norms are behind the blocks
  DeviceProjection head_dense;
  kernels::DeviceNorm head_norm;
  DeviceProjection head;
  DeviceProjection pooler;
  DeviceProjection classifier;
  const float* alibi_slopes = nullptr;  ///< [this rank's query heads], or null

 private:
  /// Tells each projection of a layer which one is next.
  void link(const ModelSpec& spec);
  void* keep_tensor(at::Tensor tensor);
  const void* keep_rounded(const std::vector<float>& values);
  kernels::DeviceNorm norm(const ModelSpec& spec, const Norm& norm, kernels::NormKind kind);
  DeviceProjection projection(const Linear& linear, bool splits_input = false);
  kernels::DeviceEmbeddingLookup table(const Table& table);

  DType dtype_;
  std::vector<at::Tensor> kept_;
  std::int64_t bytes_ = 0;
};

}  // namespace moq::inference::cuda
