#pragma once

#include <cstdint>
#include <string>

#include "inference/engine/model_spec.h"
#include "inference/engine/weights.h"
#include "inference/policies/parameter_map.h"
#include "kernels/decode_step.h"

/// A step of one token as one kernel (kernels/decode_step.h): for which models, and when.
namespace moq::inference::cuda {

/// How steps of one token are to be computed.
enum class DecodeStepChoice : std::uint8_t { kFastest, kChain, kPersistent };

/// What the environment variable MOQ_DECODE_STEP asks for.
/// @throws moq::Error for anything but chain and persistent
DecodeStepChoice decode_step_choice();

/// What such a step depends on besides the weights.
struct DecodeStepModel {
  const ModelSpec& spec;
  DType dtype;  ///< of activations
  DType kv_dtype;
  int ranks;
};

/// What such steps are like for a model that has no obstacle.
kernels::DecodeStepShape decode_step_shape(const ModelSpec& spec, DType dtype);

/// What keeps a model on the current GPU from such steps, whatever its weights are; empty: nothing.
std::string decode_step_obstacle(const DecodeStepModel& model);

/// Refuses what MOQ_DECODE_STEP=persistent can't be had for, as far as it can be known before
/// weights are loaded.
/// @throws moq::Error naming the obstacle
void check_decode_step(const DecodeStepModel& model, const ParameterMap& parameters,
                       const LoadOptions& load);

/// @throws moq::Error naming the obstacle
[[noreturn]] void refuse_decode_step(const ModelSpec& spec, const std::string& obstacle);

/// Whether the one kernel is the faster way of a step behind so many cached tokens.
bool decode_step_is_faster(std::int64_t num_heads, std::int64_t past_length);

}  // namespace moq::inference::cuda
