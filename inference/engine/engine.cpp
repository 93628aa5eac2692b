#include "inference/engine/engine.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "inference/checkpoint/checkpoint.h"
#include "inference/checkpoint/json.h"
#include "inference/checkpoint/mapped_file.h"
#include "inference/engine/quantization_config.h"
#include "inference/policies/parameter_map.h"
#include "inference/policies/policy.h"
#include "kernels/common/check.h"
#include "kernels/common/parallel.h"

namespace moq::inference {
namespace {

using checkpoint::Checkpoint;
using checkpoint::Json;

// Logits computed at once by forward(), in tokens: bounds the workspace beside the result.
constexpr std::int64_t kLogitRowsAtOnce = 64;

Json read_json(const std::filesystem::path& path) {
  return Json::parse(checkpoint::read_text_file(path), path.filename().string());
}

}  // namespace

Engine Engine::open(const std::filesystem::path& directory, const EngineOptions& options) {
  MOQ_CHECK(std::filesystem::is_directory(directory), "engine: the model must be a directory, got ",
            directory.string());
  MOQ_CHECK(options.activations.value_or("dynamic") == "dynamic",
            "engine: activations must be None or \"dynamic\" on the CPU, got \"",
            *options.activations, "\"");
  const Json config = read_json(directory / "config.json");
  const QuantizationConfig quantization = QuantizationConfig::parse(config);
  auto files = std::make_shared<const Checkpoint>(Checkpoint::open(directory));
  const Policy policy = options.policy.has_value()
                            ? parse_policy(read_json(*options.policy), options.policy->string())
                            : find_policy(config, builtin_policies());
  const ParameterMap parameters = ParameterMap::resolve(policy, config, *files);
  auto communicator = options.communicator ? options.communicator : single_process();
  Weights weights =
      load_weights(parameters, std::move(files),
                   {.dtype = options.dtype.has_value() ? parse_weight_dtype(*options.dtype)
                                                       : WeightDtype::kAsStored,
                    .quantize_head = options.quantize_head,
                    .dynamic_activations = options.activations.has_value(),
                    .quantization = quantization,
                    .rank = communicator->rank(),
                    .size = communicator->size()});
  return {Transformer(parameters.spec(), std::move(weights), std::move(communicator)), policy.name};
}

std::string Engine::activations() const {
  const auto& layers = model_.weights().layers;
  const bool dynamic = std::any_of(layers.begin(), layers.end(), [](const Layer& layer) {
    return layer.up.input_mode == kernels::InputMode::kDynamicInt8 ||
           layer.qkv.input_mode == kernels::InputMode::kDynamicInt8;
  });
  return dynamic ? "dynamic" : "weight_only";
}

std::string Engine::weight_format() const {
  return kernels::name_of(model_.weights().layers.front().qkv.weight.shape.format);
}

std::string Engine::head_format() const {
  return spec().has_head ? kernels::name_of(model_.weights().head.weight.shape.format) : "";
}

KvCache Engine::make_cache(std::int64_t num_slots, std::int64_t capacity) const {
  MOQ_CHECK(spec().attention == AttentionKind::kCausal,
            "engine: a KV cache needs a causal model, got ", spec().architecture);
  MOQ_CHECK(capacity <= spec().max_positions, "engine: a KV cache must hold at most the model's ",
            spec().max_positions, " positions, got ", capacity);
  return model_.make_cache(num_slots, capacity);
}

GenerationResult Engine::generate(std::span<const std::vector<std::int64_t>> prompts,
                                  GenerationOptions options, const OnToken& on_token) {
  const kernels::ThreadScope threads(at::get_num_threads());
  std::vector<std::int64_t> request = {options.max_new_tokens};
  for (const std::vector<std::int64_t>& prompt : prompts) {
    request.push_back(static_cast<std::int64_t>(prompt.size()));
    request.insert(request.end(), prompt.begin(), prompt.end());
  }
  check_agreement(model_.communicator(), "generate: the prompts", request);
  at::Tensor seed = at::scalar_tensor(static_cast<std::int64_t>(options.sampling.seed), at::kLong);
  model_.communicator().broadcast(seed, 0);
  options.sampling.seed = static_cast<std::uint64_t>(seed.item<std::int64_t>());
  return inference::generate(model_, prompts, options, on_token);
}

void Engine::run(std::span<const TokenSequence> sequences, KvCache* cache,
                 std::span<const std::int64_t> slots) {
  MOQ_CHECK(cache == nullptr || slots.size() == sequences.size(),
            "engine: every sequence must have a slot of the KV cache, got ", slots.size(), " for ",
            sequences.size());
  batch_.clear();
  std::vector<std::int64_t> request;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const TokenSequence& sequence = sequences[i];
    MOQ_CHECK(!sequence.token_ids.empty(),
              "engine: a sequence must have at least one token, got none in sequence ", i);
    const std::int64_t slot = cache == nullptr ? 0 : slots[i];
    request.push_back(static_cast<std::int64_t>(sequence.token_ids.size()));
    request.insert(request.end(), sequence.token_ids.begin(), sequence.token_ids.end());
    batch_.append(sequence.token_ids, slot, cache == nullptr ? 0 : cache->length(slot),
                  sequence.token_types);
  }
  check_agreement(model_.communicator(), "engine: the tokens", request);
  model_.forward(batch_, cache);
}

at::Tensor Engine::forward(std::span<const TokenSequence> sequences, KvCache* cache,
                           std::span<const std::int64_t> slots) {
  MOQ_CHECK(spec().has_head, "engine: forward needs a model with a language-model head, got ",
            spec().architecture, ": use encode");
  const kernels::ThreadScope threads(at::get_num_threads());
  run(sequences, cache, slots);
  const std::int64_t num_tokens = batch_.num_tokens();
  const std::int64_t vocab_size = spec().vocab_size;
  at::Tensor logits = at::empty({num_tokens, vocab_size}, at::kFloat);
  std::vector<std::int64_t> rows;
  for (std::int64_t begin = 0; begin < num_tokens; begin += kLogitRowsAtOnce) {
    rows.resize(static_cast<std::size_t>(std::min(kLogitRowsAtOnce, num_tokens - begin)));
    std::iota(rows.begin(), rows.end(), begin);
    std::memcpy(logits.mutable_data_ptr<float>() + begin * vocab_size, model_.logits(rows),
                sizeof(float) * rows.size() * static_cast<std::size_t>(vocab_size));
  }
  return logits;
}

Encoding Engine::encode(std::span<const TokenSequence> sequences) {
  const kernels::ThreadScope threads(at::get_num_threads());
  run(sequences, nullptr, {});
  const auto copy = [](const float* values, std::int64_t rows, std::int64_t cols) {
    at::Tensor tensor = at::empty({rows, cols}, at::kFloat);
    std::memcpy(tensor.mutable_data_ptr<float>(), values,
                sizeof(float) * static_cast<std::size_t>(rows * cols));
    return tensor;
  };
  const auto num_sequences = static_cast<std::int64_t>(sequences.size());
  Encoding encoding;
  encoding.last_hidden_state = copy(model_.hidden_state(), batch_.num_tokens(), spec().hidden_size);
  if (spec().has_pooler) {
    const std::vector<float> pooled = model_.pooled(batch_);
    encoding.pooled = copy(pooled.data(), num_sequences, spec().hidden_size);
    if (spec().has_classifier) {
      encoding.logits = copy(model_.classify(pooled).data(), num_sequences, spec().num_labels);
    }
  }
  return encoding;
}

}  // namespace moq::inference
