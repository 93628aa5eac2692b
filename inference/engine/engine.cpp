#include "inference/engine/engine.h"

#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <utility>

#include "inference/checkpoint/checkpoint.h"
#include "inference/checkpoint/json.h"
#include "inference/checkpoint/mapped_file.h"
#include "inference/engine/cpu_transformer.h"
#include "inference/engine/quantization_config.h"
#include "inference/policies/parameter_map.h"
#include "inference/policies/policy.h"
#include "kernels/common/check.h"
#include "kernels/common/parallel.h"

#if defined(MOQ_WITH_CUDA)
#include "inference/engine/cuda/transformer.h"
#endif

namespace moq::inference {
namespace {

using checkpoint::Checkpoint;
using checkpoint::Json;

// Tokens computed at once by forward() and encode(): a bound of the workspace beside the result. A
// longer sequence is computed alone. Twice as many tokens leave fewer of a GPU's multiprocessors
// idle behind the last tiles of a product.
constexpr std::int64_t kTokensAtOnce = 2048;
constexpr std::int64_t kTokensAtOnceOnGpu = 4096;

Json read_json(const std::filesystem::path& path) {
  return Json::parse(checkpoint::read_text_file(path), path.filename().string());
}

/// The names of INT8 inputs.
constexpr std::pair<kernels::InputMode, const char*> kActivations[] = {
    {kernels::InputMode::kDynamicInt8, "dynamic"},
    {kernels::InputMode::kStaticInt8, "static"},
    {kernels::InputMode::kDynamicAsymmetricInt8, "dynamic_asymmetric"},
    {kernels::InputMode::kStaticAsymmetricInt8, "static_asymmetric"},
};

/// Those that a caller may ask for: static ones need what only training knows.
std::optional<kernels::InputMode> parse_activations(const std::optional<std::string>& name) {
  if (!name.has_value()) {
    return std::nullopt;
  }
  const auto* const found = std::ranges::find_if(kActivations, [&](const auto& known) {
    return is_dynamic(known.first) && known.second == name;
  });
  MOQ_CHECK(found != std::end(kActivations),
            "engine: activations must be None, \"dynamic\" or \"dynamic_asymmetric\", got \"",
            *name, "\"");
  return found->first;
}

/// The bits of a number, for check_agreement.
std::int64_t bits_of(float value) {
  return std::bit_cast<std::int32_t>(value);
}

void add_list(std::vector<std::int64_t>& request, std::span<const std::int64_t> list) {
  request.push_back(static_cast<std::int64_t>(list.size()));
  request.insert(request.end(), list.begin(), list.end());
}

std::int64_t total_tokens(std::span<const TokenSequence> sequences) {
  std::int64_t total = 0;
  for (const TokenSequence& sequence : sequences) {
    total += static_cast<std::int64_t>(sequence.token_ids.size());
  }
  return total;
}

/// The model on the device that the options name.
std::unique_ptr<Transformer> open_transformer(const ParameterMap& parameters,
                                              std::shared_ptr<const Checkpoint> files,
                                              const LoadOptions& load, const EngineOptions& options,
                                              const std::shared_ptr<Communicator>& communicator) {
  if (options.device.is_cpu()) {
    MOQ_CHECK(options.compute_dtype.value_or("fp32") == "fp32",
              "engine: compute_dtype must be None or fp32 on the CPU, got ",
              *options.compute_dtype);
    MOQ_CHECK(!options.kv_cache_dtype.has_value(),
              "engine: kv_cache_dtype must be None on the CPU, got ", *options.kv_cache_dtype);
    return std::make_unique<CpuTransformer>(
        parameters.spec(), load_weights(parameters, std::move(files), load), communicator);
  }
  MOQ_CHECK(options.device.is_cuda(), "engine: device must be cpu or cuda, got ",
            options.device.str());
#if defined(MOQ_WITH_CUDA)
  return open_cuda_transformer(parameters, files, load,
                               {.device = options.device,
                                .compute_dtype = options.compute_dtype,
                                .kv_cache_dtype = options.kv_cache_dtype,
                                .group_name = options.device_group},
                               communicator);
#else
  moq::detail::fail("engine: device cuda needs moq built with CUDA, got a build without: install ",
                    "nvcc and build again (`moq doctor` says what was found)");
#endif
}

}  // namespace

/// The engine's use by one thread; others wait. A thread that has it already, which can only be a
/// callback of generate, would wait for itself.
class Engine::Call {
 public:
  explicit Call(Use& use) : use_(use) {
    MOQ_CHECK(use.holder != std::this_thread::get_id(),
              "engine: a callback of generate must not call the engine that runs it, got such a ",
              "call: return False to end the row, and call the engine afterwards");
    use.mutex.lock();
    use.holder = std::this_thread::get_id();
  }
  /// Of what computes.
  Call(Use& use, const Transformer& model) : Call(use) {
    outside_captures_ = model.outside_captures();
  }
  ~Call() {
    use_.holder = std::thread::id{};
    use_.mutex.unlock();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  Use& use_;
  std::unique_ptr<DeviceScope> outside_captures_;
  kernels::ThreadScope threads_{at::get_num_threads()};
};

Engine Engine::open(const std::filesystem::path& directory, const EngineOptions& options) {
  const kernels::ThreadScope threads(at::get_num_threads());
  MOQ_CHECK(
      std::filesystem::is_directory(directory), "engine: the model must be a directory, got ",
      directory.string(),
      std::filesystem::exists(directory)
          ? ", a file"
          : ", which is not there: names of models on a hub are not looked up, download first");
  MOQ_CHECK(std::filesystem::exists(directory / "config.json"), "engine: ", directory.string(),
            " must hold a model's config.json, got none: name a directory that optimizer.export or "
            "moq export wrote, or one of a Hugging Face model");
  const std::optional<kernels::InputMode> input_mode = parse_activations(options.activations);
  const Json config = read_json(directory / "config.json");
  const QuantizationConfig quantization = QuantizationConfig::parse(config);
  auto files = std::make_shared<const Checkpoint>(Checkpoint::open(directory));
  const Policy policy = options.policy.has_value()
                            ? parse_policy(read_json(*options.policy), options.policy->string())
                            : find_policy(config, builtin_policies());
  const ParameterMap parameters = ParameterMap::resolve(policy, config, *files);
  auto communicator = options.communicator ? options.communicator : single_process();
  const LoadOptions load{.dtype = options.dtype.has_value() ? parse_weight_dtype(*options.dtype)
                                                            : WeightDtype::kAsStored,
                         .quantize_head = options.quantize_head,
                         .input_mode = input_mode,
                         .quantization = quantization,
                         .rank = communicator->rank(),
                         .size = communicator->size()};
  return {open_transformer(parameters, std::move(files), load, options, communicator), policy.name,
          communicator};
}

std::string Engine::activations() const {
  const auto& layers = model_->weights().layers;
  for (const auto& [mode, name] : kActivations) {
    const bool read = std::any_of(layers.begin(), layers.end(), [mode = mode](const Layer& layer) {
      const Linear* const projections[] = {&layer.qkv, &layer.attention_out, &layer.up,
                                           &layer.down};
      return std::ranges::any_of(
          projections, [mode](const Linear* projection) { return projection->input.mode == mode; });
    });
    if (read) {
      return name;
    }
  }
  return "weight_only";
}

std::string Engine::weight_format() const {
  return kernels::name_of(model_->weights().layers.front().qkv.shape().format);
}

std::string Engine::head_format() const {
  return spec().has_head ? kernels::name_of(model_->weights().head.shape().format) : "";
}

MemoryReport Engine::memory() const {
  const Call call(*in_use_);
  return model_->memory();
}

std::vector<KernelRecord> Engine::decode_kernels() const {
  const Call call(*in_use_);
  return model_->decode_kernels();
}

std::unique_ptr<KvCache> Engine::make_cache(std::int64_t num_slots, std::int64_t capacity) {
  MOQ_CHECK(spec().attention == AttentionKind::kCausal,
            "engine: a KV cache needs a causal model, got ", spec().architecture);
  MOQ_CHECK(capacity <= spec().max_positions, "engine: a KV cache must hold at most the model's ",
            spec().max_positions, " positions, got ", capacity);
  const Call call(*in_use_, *model_);
  return model_->make_cache(num_slots, capacity);
}

GenerationResult Engine::generate(std::span<const std::vector<std::int64_t>> prompts,
                                  GenerationOptions options, const OnToken& on_token) {
  const Call call(*in_use_, *model_);
  const kernels::SamplingParams& sampling = options.sampling;
  std::vector<std::int64_t> request = {options.max_new_tokens,
                                       options.max_batch,
                                       options.chunk_tokens.value_or(0),
                                       bits_of(sampling.temperature),
                                       sampling.top_k,
                                       bits_of(sampling.top_p),
                                       bits_of(sampling.min_p),
                                       bits_of(sampling.repetition_penalty)};
  add_list(request, options.stop_tokens);
  for (const std::vector<std::int64_t>& prompt : prompts) {
    add_list(request, prompt);
  }
  check_agreement(model_->communicator(), "generate: the prompts and options", request);
  at::Tensor seed = at::scalar_tensor(static_cast<std::int64_t>(options.sampling.seed), at::kLong);
  model_->communicator().broadcast(seed, 0);
  options.sampling.seed = static_cast<std::uint64_t>(seed.item<std::int64_t>());
  return inference::generate(*model_, prompts, options, on_token);
}

at::Tensor Engine::new_result(at::IntArrayRef sizes) const {
  at::Tensor result;
  on_all_ranks(model_->communicator(), "memory for the result",
               [&] { result = model_->new_result(sizes); });
  return result;
}

/// Runs the model on all sequences, piece by piece, each of whole sequences; calls on_piece() after
/// each, which may ask for logits if with_logits is set, and before the first of them make_room(),
/// also if there is none. A sequence's result does not depend on the piece it is in. After an error
/// the cache holds what it held before.
template <typename MakeRoom, typename OnPiece>
void Engine::run(std::span<const TokenSequence> sequences, KvCache* cache,
                 std::span<const std::int64_t> slots, bool with_logits, const MakeRoom& make_room,
                 const OnPiece& on_piece) {
  // First of all: a rank that throws alone leaves the others waiting for it.
  if (model_->communicator().size() > 1) {
    std::vector<std::int64_t> request;
    for (const auto& [token_ids, token_types] : sequences) {
      add_list(request, token_ids);
      add_list(request, token_types);
    }
    add_list(request, slots);
    if (cache != nullptr) {
      for (const std::int64_t slot : slots) {
        request.push_back(cache->holds(slot) ? cache->length(slot) : -1);
      }
    }
    check_agreement(model_->communicator(), "engine: the tokens and slots", request);
  }
  MOQ_CHECK(cache == nullptr || slots.size() == sequences.size(),
            "engine: every sequence must have a slot of the KV cache, got ", slots.size(), " for ",
            sequences.size());
  all_.clear();
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const auto& [token_ids, token_types] = sequences[i];
    MOQ_CHECK(!token_ids.empty(),
              "engine: a sequence must have at least one token, got none in sequence ", i);
    const std::int64_t slot = cache == nullptr ? 0 : slots[i];
    all_.append(token_ids, slot, cache == nullptr ? 0 : cache->length(slot), token_types);
  }
  model_->check(all_, cache);
  const std::vector<kernels::AttentionSequence> places(all_.sequences().begin(),
                                                       all_.sequences().end());
  const std::int64_t at_once = model_->device().is_cpu() ? kTokensAtOnce : kTokensAtOnceOnGpu;
  std::vector<std::size_t> ends;  // of the pieces, in sequences
  std::int64_t in_piece = 0;
  std::int64_t largest = 0;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const std::int64_t count = places[i].num_tokens;
    if (in_piece > 0 && in_piece + count > at_once) {
      ends.push_back(i);
      in_piece = 0;
    }
    in_piece += count;
    largest = std::max(largest, in_piece);
  }
  ends.push_back(sequences.size());
  const std::unique_ptr<DeviceScope> in_one_go = model_->in_one_go();
  model_->reserve(largest);
  if (with_logits) {
    model_->reserve_logits(largest);
  }
  std::size_t next = 0;
  try {
    for (const std::size_t end : ends) {
      if (ends.size() == 1) {
        std::swap(batch_, all_);
      } else {
        batch_.clear();
        for (; next < end; ++next) {
          const auto& [token_ids, token_types] = sequences[next];
          batch_.append(token_ids, places[next].slot, places[next].past_length, token_types);
        }
      }
      const bool is_empty = batch_.num_tokens() == 0;
      if (!is_empty) {
        model_->forward(batch_, cache);
      }
      if (end == ends.front()) {
        make_room();  // when all else has its memory; a GPU computes meanwhile
      }
      if (!is_empty) {
        on_piece();
      }
    }
  } catch (...) {
    for (const kernels::AttentionSequence& place : places) {
      if (cache != nullptr) {
        cache->truncate(place.slot, place.past_length);
      }
    }
    throw;
  }
}

at::Tensor Engine::forward(std::span<const TokenSequence> sequences, KvCache* cache,
                           std::span<const std::int64_t> slots) {
  MOQ_CHECK(spec().has_head, "engine: forward needs a model with a language-model head, got ",
            spec().architecture, ": use encode");
  const Call call(*in_use_, *model_);
  at::Tensor logits;
  const auto make_room = [&] { logits = new_result({total_tokens(sequences), spec().vocab_size}); };
  std::int64_t done = 0;
  run(sequences, cache, slots, /*with_logits=*/true, make_room, [&] {
    const std::int64_t count = batch_.num_tokens();
    model_->logits(logits.narrow(0, done, count));
    done += count;
  });
  return logits;
}

void Engine::release_graphs() {
  const Call call(*in_use_);
  model_->release_graphs();
}

Encoding Engine::encode(std::span<const TokenSequence> sequences) {
  const Call call(*in_use_, *model_);
  const auto num_sequences = static_cast<std::int64_t>(sequences.size());
  Encoding encoding;
  const auto make_room = [&] {
    encoding.last_hidden_state = new_result({total_tokens(sequences), spec().hidden_size});
    if (spec().has_pooler) {
      encoding.pooled = new_result({num_sequences, spec().hidden_size});
      if (spec().has_classifier) {
        encoding.logits = new_result({num_sequences, spec().num_labels});
      }
    }
  };
  std::int64_t token = 0;
  std::int64_t sequence = 0;
  run(sequences, nullptr, {}, /*with_logits=*/false, make_room, [&] {
    const std::int64_t num_tokens = batch_.num_tokens();
    const auto count = static_cast<std::int64_t>(batch_.sequences().size());
    model_->hidden_state(encoding.last_hidden_state.narrow(0, token, num_tokens));
    if (spec().has_pooler) {
      const at::Tensor pooled = encoding.pooled.narrow(0, sequence, count);
      model_->pooled(batch_, pooled);
      if (spec().has_classifier) {
        model_->classify(pooled, encoding.logits.narrow(0, sequence, count));
      }
    }
    token += num_tokens;
    sequence += count;
  });
  return encoding;
}

}  // namespace moq::inference
