// A step of one token as one kernel, for decoders that there is one for.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "inference/engine/cuda/decode_step.h"
#include "inference/engine/cuda/device_memory.h"
#include "inference/engine/cuda/on_device.h"
#include "inference/engine/cuda/transformer.h"
#include "kernels/decode_step.h"

namespace moq::inference::cuda {
namespace {

namespace gpu = kernels::cuda;

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
    if (projection->input.mode != kernels::InputMode::kFloat32) {
      return false;
    }
  }
  return true;
}

/// What keeps a stored projection from such steps; empty: nothing.
std::string obstacle_in(const ModuleParameters& module, bool has_siblings,
                        const LoadOptions& load) {
  const WeightSource& weight = *module.matrix;
  if (!weight.quantized()) {
    return load.dtype == WeightDtype::kInt8
               ? ""
               : module.name + " in " + std::string(name_of(weight.dtype())) +
                     " (dtype=\"int8\" quantizes it)";
  }
  if (weight.asymmetric()) {
    return module.name + " with zero points";
  }
  if (weight.group_size() != weight.cols()) {
    return module.name + " with a scale for " + std::to_string(weight.group_size()) + " columns";
  }
  if (weight.num_bits() <= 4 && !has_siblings) {  // beside wider siblings it becomes wider
    return module.name + " of " + std::to_string(weight.num_bits()) + " bits";
  }
  if (load.quantization.input_of(module.name) != kernels::InputMode::kFloat32) {
    return module.name + " with INT8 activations";
  }
  return "";
}

/// The same of all projections of the layers.
std::string weights_obstacle(const ParameterMap& parameters, const LoadOptions& load) {
  if (load.input_mode.has_value()) {
    return "INT8 activations";
  }
  if (load.dtype != WeightDtype::kAsStored && load.dtype != WeightDtype::kInt8) {
    return "float weights";
  }
  for (std::int64_t layer = 0; layer < parameters.spec().num_layers; ++layer) {
    for (const Module module : {Module::kQkv, Module::kQuery, Module::kKey, Module::kValue,
                                Module::kAttentionOut, Module::kUp, Module::kDown}) {
      const ModuleParameters* const found = parameters.find(module, layer);
      if (found == nullptr) {
        continue;
      }
      const bool has_siblings =
          module == Module::kQuery || module == Module::kKey || module == Module::kValue;
      std::string obstacle = obstacle_in(*found, has_siblings, load);
      if (!obstacle.empty()) {
        return obstacle;
      }
    }
  }
  return "";
}

}  // namespace

DecodeStepChoice decode_step_choice() {
  const char* const variable = std::getenv("MOQ_DECODE_STEP");
  const std::string name = variable == nullptr ? "" : variable;
  MOQ_CHECK(name.empty() || name == "chain" || name == "persistent",
            "engine: MOQ_DECODE_STEP must be chain or persistent, got ", name);
  return name.empty()      ? DecodeStepChoice::kFastest
         : name == "chain" ? DecodeStepChoice::kChain
                           : DecodeStepChoice::kPersistent;
}

kernels::DecodeStepShape decode_step_shape(const ModelSpec& spec, DType dtype) {
  return {.num_layers = spec.num_layers,
          .hidden_size = spec.hidden_size,
          .num_heads = spec.num_heads,
          .head_dim = spec.head_dim,
          .intermediate_size = spec.intermediate_size,
          .activation = spec.activation,
          .norm_epsilon = static_cast<float>(spec.norm_epsilon),
          .dtype = dtype};
}

std::string decode_step_obstacle(const DecodeStepModel& model) {
  const ModelSpec& spec = model.spec;
  const std::pair<bool, const char*> unlike[] = {
      {spec.norm != NormKind::kLayerNorm, "RMSNorm"},
      {spec.norm_place != NormPlace::kPre, "norms behind the blocks"},
      {spec.parallel_residual, "a parallel residual"},
      {spec.attention != AttentionKind::kCausal, "bidirectional attention"},
      {spec.qk_norm, "norms of q and k"},
      {spec.gated, "a gated feed-forward block"},
      {spec.num_kv_heads != spec.num_heads, "heads that share keys"},
      {spec.positions == PositionKind::kRotary, "rotary positions"},
      {spec.positions == PositionKind::kAlibi, "ALiBi"}};
  for (const auto& [is_so, what] : unlike) {
    if (is_so) {
      return what;
    }
  }
  if (model.ranks > 1) {
    return std::to_string(model.ranks) + " ranks";
  }
  if (model.dtype == DType::kFloat32) {
    return "activations in float32";
  }
  if (model.kv_dtype != model.dtype) {
    return "a KV cache in " + std::string(name_of(model.kv_dtype));
  }
  if (!gpu::decode_step_supports(decode_step_shape(spec, model.dtype))) {
    return std::to_string(spec.num_layers) + " layers of " + std::to_string(spec.num_heads) +
           " heads of " + std::to_string(spec.head_dim) + " columns, hidden size " +
           std::to_string(spec.hidden_size) + ", feed-forward " +
           std::to_string(spec.intermediate_size) + ", on this GPU";
  }
  return "";
}

void refuse_decode_step(const ModelSpec& spec, const std::string& obstacle) {
  moq::detail::fail(
      "engine: MOQ_DECODE_STEP=persistent must be asked of a GPU and a model that "
      "kernels/decode_step.h supports, got ",
      spec.architecture, " with ", obstacle, ": unset it, or say chain");
}

void check_decode_step(const DecodeStepModel& model, const ParameterMap& parameters,
                       const LoadOptions& load) {
  if (decode_step_choice() != DecodeStepChoice::kPersistent) {
    return;
  }
  std::string obstacle = decode_step_obstacle(model);
  if (obstacle.empty()) {
    obstacle = weights_obstacle(parameters, load);
  }
  if (!obstacle.empty()) {
    refuse_decode_step(model.spec, obstacle);
  }
}

/// Measured on an H200 (tests/benchmarks/decode_step_cuda.cu; its table is in docs/benchmarks.md):
/// five thread blocks that share a head's keys fall behind a chain that takes all multiprocessors
/// for few heads, from so many cached tokens on.
bool decode_step_is_faster(std::int64_t num_heads, std::int64_t past_length) {
  struct Limit {
    std::int64_t most_heads;
    std::int64_t longest_past;
  };
  constexpr Limit kLimits[] = {{4, 4608},  {8, 5120},   {9, 6656},   {10, 7680}, {11, 8704},
                               {12, 9216}, {14, 10240}, {16, 11776}, {20, 21504}};
  const auto* const limit = std::ranges::find_if(
      kLimits, [&](const Limit& limit) { return num_heads <= limit.most_heads; });
  return limit == std::end(kLimits) || past_length <= limit->longest_past;
}

/// What keeps this model from steps as one kernel; empty: nothing.
std::string CudaTransformer::decode_step_obstacle() const {
  std::string obstacle = cuda::decode_step_obstacle(
      {.spec = spec_, .dtype = dtype_, .kv_dtype = kv_dtype_, .ranks = communicator_->size()});
  if (!obstacle.empty()) {
    return obstacle;
  }
  const kernels::DecodeStepShape shape = decode_step_shape(spec_, dtype_);
  for (const DeviceLayer& layer : device_weights_.layers) {
    if (!reads_numbers(layer)) {
      return "INT8 activations";
    }
    if (!gpu::decode_step_supports(shape, layer_of(layer))) {
      return "other weights than symmetric INT8 ones with a scale a row";
    }
  }
  return "";
}

/// Makes what such steps need, unless they are computed by a chain of kernels.
void CudaTransformer::prepare_decode_step() {
  decode_step_choice_ = decode_step_choice();
  if (decode_step_choice_ == DecodeStepChoice::kChain) {
    return;
  }
  if (const std::string obstacle = decode_step_obstacle(); !obstacle.empty()) {
    if (decode_step_choice_ == DecodeStepChoice::kPersistent) {
      refuse_decode_step(spec_, obstacle);
    }
    return;
  }
  const kernels::DecodeStepShape shape = decode_step_shape(spec_, dtype_);
  std::vector<kernels::DecodeStepLayer> layers;
  for (const DeviceLayer& layer : device_weights_.layers) {
    layers.push_back(layer_of(layer));
  }
  decode_state_ =
      allocate(static_cast<std::int64_t>(gpu::decode_step_state_size(shape)), "the weights");
  gpu::prepare_decode_step(shape, layers, decode_state_.mutable_data_ptr(),
                           c10::cuda::getCurrentCUDAStream());
}

/// Whether one kernel computes a step of a single token behind so many.
bool CudaTransformer::takes_one_kernel(std::int64_t past_length) const {
  return decode_state_.defined() && (decode_step_choice_ == DecodeStepChoice::kPersistent ||
                                     decode_step_is_faster(q_heads(), past_length));
}

bool CudaTransformer::is_decode_step(const Step& step) const {
  return step.cache != nullptr && step.num_tokens == 1 && step.num_decoding == 1 &&
         takes_one_kernel(step.num_keys - 1);
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
    gpu::decode_step({.shape = decode_step_shape(spec_, dtype_),
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
