// A step of one token as one kernel, for decoders that there is one for.
#include <cstdlib>
#include <string>
#include <vector>

#include "inference/engine/cuda/device_memory.h"
#include "inference/engine/cuda/on_device.h"
#include "inference/engine/cuda/transformer.h"
#include "kernels/decode_step.h"

namespace moq::inference::cuda {
namespace {

namespace gpu = kernels::cuda;

/// How steps of one token are to be computed.
enum class DecodeStepChoice : std::uint8_t { kFastest, kChain, kPersistent };

/// What the environment variable MOQ_DECODE_STEP asks for.
DecodeStepChoice decode_step_choice() {
  const char* const variable = std::getenv("MOQ_DECODE_STEP");
  const std::string name = variable == nullptr ? "" : variable;
  MOQ_CHECK(name.empty() || name == "chain" || name == "persistent",
            "engine: MOQ_DECODE_STEP must be chain or persistent, got ", name);
  return name.empty()      ? DecodeStepChoice::kFastest
         : name == "chain" ? DecodeStepChoice::kChain
                           : DecodeStepChoice::kPersistent;
}

kernels::DecodeStepLayer layer_of(const DeviceLayer& layer) {
  return {.attention_norm = layer.attention_norm,
          .qkv = layer.qkv.weight,
          .qkv_bias = layer.qkv.bias,
          .attention_out = layer.attention_out.weight,
          .attention_out_bias = layer.attention_out.bias,
          .ffn_norm = layer.ffn_norm,
          .up = layer.up.weight,
          .up_bias = layer.up.bias,
          .down = layer.down.weight,
          .down_bias = layer.down.bias};
}

bool reads_numbers(const DeviceLayer& layer) {
  for (const DeviceProjection* projection :
       {&layer.qkv, &layer.attention_out, &layer.up, &layer.down}) {
    if (projection->input_mode != kernels::InputMode::kFloat32) {
      return false;
    }
  }
  return true;
}

}  // namespace

kernels::DecodeStepShape CudaTransformer::decode_step_shape() const {
  return {.num_layers = spec_.num_layers,
          .hidden_size = spec_.hidden_size,
          .num_heads = q_heads(),
          .head_dim = spec_.head_dim,
          .intermediate_size = weights_.ffn.size(),
          .activation = spec_.activation,
          .norm_epsilon = static_cast<float>(spec_.norm_epsilon),
          .dtype = dtype_};
}

/// Whether a kernel computes all layers of this model for one token.
bool CudaTransformer::has_decode_step() const {
  const bool plain =
      spec_.norm_place == NormPlace::kPre && !spec_.parallel_residual &&
      spec_.attention == AttentionKind::kCausal && !spec_.qk_norm && !spec_.gated &&
      kv_heads() == q_heads() &&
      (spec_.positions == PositionKind::kLearned || spec_.positions == PositionKind::kNone);
  if (!plain || group_ || kv_dtype_ != dtype_) {
    return false;
  }
  const kernels::DecodeStepShape shape = decode_step_shape();
  for (const DeviceLayer& layer : device_weights_.layers) {
    if (!reads_numbers(layer) || !gpu::decode_step_supports(shape, layer_of(layer))) {
      return false;
    }
  }
  return true;
}

/// Makes what such steps need, unless they are computed by a chain of kernels. (The one kernel was
/// the faster one at all sizes of GPT-2 that were timed, with up to 1000 tokens of the past.)
void CudaTransformer::prepare_decode_step() {
  const DecodeStepChoice choice = decode_step_choice();
  if (choice == DecodeStepChoice::kChain) {
    return;
  }
  if (!has_decode_step()) {
    MOQ_CHECK(choice == DecodeStepChoice::kFastest,
              "engine: MOQ_DECODE_STEP=persistent must be asked of a GPU and a model that "
              "kernels/decode_step.h supports, in one process and with activations and a KV cache "
              "of 16 bits, got ",
              spec_.architecture, " in ", name_of(dtype_), " with a KV cache in ",
              name_of(kv_dtype_), ": unset it, or say chain");
    return;
  }
  const kernels::DecodeStepShape shape = decode_step_shape();
  std::vector<kernels::DecodeStepLayer> layers;
  for (const DeviceLayer& layer : device_weights_.layers) {
    layers.push_back(layer_of(layer));
  }
  decode_state_ =
      allocate(static_cast<std::int64_t>(gpu::decode_step_state_size(shape)), "the weights");
  gpu::prepare_decode_step(shape, layers, decode_state_.mutable_data_ptr(),
                           c10::cuda::getCurrentCUDAStream());
}

bool CudaTransformer::is_decode_step(const Step& step) const {
  return decode_state_.defined() && step.cache != nullptr && step.num_tokens == 1 &&
         step.num_decoding == 1;
}

/// x = the layers of one token's embedding.
void CudaTransformer::run_decode_step(const Step& step) {
  embed(step, workspace_.normed);
  std::int64_t bytes =
      2 * step.num_keys * kv_heads() * spec_.head_dim * static_cast<std::int64_t>(size_of(dtype_));
  for (const DeviceLayer& layer : device_weights_.layers) {
    for (const DeviceProjection* projection :
         {&layer.qkv, &layer.attention_out, &layer.up, &layer.down}) {
      bytes += static_cast<std::int64_t>(gpu::packed_linear_size(projection->weight.shape));
    }
  }
  launch("all layers", 1, spec_.hidden_size, bytes, [&] {
    gpu::decode_step({.shape = decode_step_shape(),
                      .state = decode_state_.mutable_data_ptr(),
                      .input = workspace_.normed,
                      .pages = step.cache->pages(0),
                      .layer_stride = step.cache->layer_stride(),
                      .page_table = step.cache->page_table(),
                      .page_table_stride = step.cache->page_table_stride(),
                      .sequence = step.inputs.sequences(),
                      .cache_row = step.inputs.device_cache_rows(),
                      .output = workspace_.x},
                     stream_);
  });
}

}  // namespace moq::inference::cuda
