#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/common/dtype.h"
#include "kernels/linear.h"
#include "kernels/norm.h"

struct CUstream_st;

namespace moq::kernels {

/// What `decode_step` must know of a decoder before it sees its weights.
struct DecodeStepShape {
  std::int64_t num_layers = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_heads = 0;  ///< of queries, keys and values alike
  std::int64_t head_dim = 0;
  std::int64_t intermediate_size = 0;
  Activation activation = Activation::kGelu;
  float norm_epsilon = 1e-5F;
  DType dtype = DType::kFloat16;  ///< of activations and biases

  bool operator==(const DecodeStepShape&) const = default;
};

/// A layer's weights: x += out(attention(qkv(norm(x)))); x += down(activation(up(norm(x)))). Device
/// memory, which stays where it is as long as steps are made with it; biases are of the shape's
/// dtype, or null.
struct DecodeStepLayer {
  DeviceNorm attention_norm{};
  PackedLinear qkv{};  ///< rows of the heads of q, then of k, then of v
  const void* qkv_bias = nullptr;
  PackedLinear attention_out{};
  const void* attention_out_bias = nullptr;
  DeviceNorm ffn_norm{};
  PackedLinear up{};
  const void* up_bias = nullptr;
  PackedLinear down{};
  const void* down_bias = nullptr;
};

/// Arguments of `decode_step`. All pointers are device memory.
struct DecodeStepArgs {
  DecodeStepShape shape{};
  void* state = nullptr;                     ///< of prepare_decode_step
  const void* input = nullptr;               ///< [hidden_size], dtype, aligned to 4 bytes
  DevicePages pages{};                       ///< of the first layer, of the shape's dtype
  std::int64_t layer_stride = 0;             ///< elements from a layer's keys to the next one's
  const std::int32_t* page_table = nullptr;  ///< [slots, page_table_stride]
  std::int64_t page_table_stride = 0;
  const DeviceSequence* sequence = nullptr;  ///< [1], of one new token
  const std::int32_t* cache_row = nullptr;   ///< [1], see DevicePages; < 0: not written
  void* output = nullptr;  ///< [hidden_size], dtype; must not overlap `input` or the state
};

namespace cuda {

/// Whether `decode_step` computes such a decoder on the current device: compute capability 9.0, at
/// most 128 layers, 1 to 26 heads of 64 columns that make up the hidden size, 5 multiprocessors for
/// each of them, a feed-forward block 4 times as wide, float16 or bfloat16.
bool decode_step_supports(const DecodeStepShape& shape);
/// The same, and whether the layer is one: LayerNorms of the shape's epsilon, and symmetric INT8
/// weights of one scale a row.
bool decode_step_supports(const DecodeStepShape& shape, const DecodeStepLayer& layer);

/// Bytes of what a decoder's steps need besides weights and cache: tables, and the memory through
/// which thread blocks tell each other their results.
/// @throws moq::Error for a shape that is not supported
std::size_t decode_step_state_size(const DecodeStepShape& shape);

/// Makes the state of a decoder's steps, decode_step_state_size bytes aligned to 128. Waits for the
/// stream, and cannot be captured. The state serves one step at a time.
/// @throws moq::Error for a shape or layer that is not supported, a missing pointer, or a launch
///         that fails
void prepare_decode_step(const DecodeStepShape& shape, std::span<const DecodeStepLayer> layers,
                         void* state, CUstream_st* stream);

/// One token through all layers of a decoder, by one kernel that stays on all multiprocessors:
///
///   x = input
///   for each layer:  x += out(attention(qkv(norm(x))));  x += down(activation(up(norm(x))))
///   output = x
///
/// The token's keys and values are appended to the cache. It can be captured in a CUDA graph.
///
/// Weights are not converted: x is rounded to a fixed point of 31 bits (of the columns that a warp
/// multiplies), whose four digits of 8 bits multiply the codes on the INT8 tensor cores; sums of
/// digits are exact, their float32 sum over 7 warps is multiplied by the row's scale. q, k, v,
/// what a fifth of a head's keys gives, the feed-forward block's inner numbers and the residual
/// stream are rounded to dtype, inputs of products are not. Results don't depend on timing.
///
/// A step that cannot go on, because the GPU has lost a thread block, ends as an error of the
/// launch after some seconds (cudaErrorLaunchFailure).
/// @throws moq::Error for a shape that is not supported, a missing or misaligned pointer, or memory
///         that overlaps; or if the launch fails, which leaves the state as it was
void decode_step(const DecodeStepArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace moq::kernels
