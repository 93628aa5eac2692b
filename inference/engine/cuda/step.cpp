// A batch on its way to the device, and whether it runs by a graph.
#include <algorithm>
#include <iterator>
#include <optional>
#include <utility>

#include "inference/engine/cuda/on_device.h"
#include "inference/engine/cuda/transformer.h"
#include "kernels/common/check.h"

namespace moq::inference::cuda {

PagedKvCache* CudaTransformer::checked(KvCache* any_cache) const {
  auto* const cache = own_cache<PagedKvCache>(any_cache);
  MOQ_CHECK(cache == nullptr || (cache->device() == device_ && cache->dtype() == kv_dtype_),
            "engine: the KV cache must be one of this engine's make_cache, of ", name_of(kv_dtype_),
            " on ", device_.str(), ", got ", name_of(cache->dtype()), " on ",
            cache->device().str());
  return cache;
}

const std::shared_ptr<StepInputs>& CudaTransformer::eager_inputs(const TokenBatch& batch,
                                                                 std::int64_t num_rows) {
  const auto num_sequences = static_cast<std::int64_t>(batch.sequences().size());
  if (!eager_inputs_ || eager_inputs_->max_tokens() < batch.num_tokens() ||
      eager_inputs_->max_sequences() < num_sequences || eager_inputs_->max_rows() < num_rows) {
    const auto larger = [&](auto size, std::int64_t needed) {
      return eager_inputs_ ? std::max((*eager_inputs_.*size)(), needed) : needed;
    };
    std::shared_ptr<StepInputs> inputs;
    on_all_ranks(*communicator_, "the inputs of a step", [&] {
      inputs = std::make_shared<StepInputs>(larger(&StepInputs::max_tokens, batch.num_tokens()),
                                            larger(&StepInputs::max_sequences, num_sequences),
                                            larger(&StepInputs::max_rows, num_rows));
    });
    eager_inputs_ = std::move(inputs);
  }
  return eager_inputs_;
}

/// Writes a checked batch to `inputs`, which may be sent when the rest of them is written too.
CudaTransformer::Step CudaTransformer::begin_step(const TokenBatch& batch, PagedKvCache* cache,
                                                  const std::shared_ptr<StepInputs>& inputs) {
  if (in_flight_) {
    synchronize("a forward pass", num_tokens_);
  }
  in_flight_ = true;
  Step step{.inputs = *inputs,
            .num_tokens = batch.num_tokens(),
            .num_decoding = inputs->write(batch),
            .num_longer = 0,
            .max_tokens = 0,
            .num_keys = 0,
            .cache = cache};
  step.num_longer = static_cast<std::int64_t>(batch.sequences().size()) - step.num_decoding;
  for (const kernels::AttentionSequence& sequence : batch.sequences()) {
    step.max_tokens = std::max(step.max_tokens, sequence.num_tokens);
    step.num_keys += sequence.past_length + sequence.num_tokens;
  }
  if (cache != nullptr) {
    for (const kernels::AttentionSequence& sequence : batch.sequences()) {
      cache->make_room(sequence.slot, sequence.num_tokens,
                       inputs->cache_rows().subspan(static_cast<std::size_t>(sequence.token_begin),
                                                    static_cast<std::size_t>(sequence.num_tokens)),
                       stream_);
    }
    last_table_ = cache->sync_page_table(stream_);
  }
  last_inputs_ = inputs;
  return step;
}

/// The graph of that key, made if there is none.
StepGraph& CudaTransformer::graph_of(const StepGraph::Key& key) {
  if (const auto known = graphs_.find(key); known != graphs_.end()) {
    return known->second;
  }
  std::optional<StepGraph> graph;
  on_all_ranks(*communicator_, "the inputs of a step", [&] { graph.emplace(key); });
  return graphs_.emplace(key, std::move(*graph)).first->second;
}

/// The graph of a batch's shape, for a batch without a cache; null for a shape that comes for the
/// first time, which may well be the last.
StepGraph* CudaTransformer::forward_graph(const TokenBatch& batch) {
  constexpr std::ptrdiff_t kMostShapes = 64;
  StepGraph::Key key{.num_tokens = batch.num_tokens()};
  for (const kernels::AttentionSequence& sequence : batch.sequences()) {
    ++(sequence.num_tokens == 1 ? key.num_decoding : key.num_longer);
    key.max_tokens = std::max(key.max_tokens, sequence.num_tokens);
  }
  if (const auto known = graphs_.find(key); known != graphs_.end()) {
    return &known->second;
  }
  if (seen_once_.erase(key) == 0) {
    if (seen_once_.size() == kMostShapes) {
      seen_once_.clear();
    }
    seen_once_.insert(key);
    return nullptr;
  }
  const auto end = std::find_if(graphs_.begin(), graphs_.end(),
                                [](const auto& graph) { return graph.first.cache != 0; });
  if (std::distance(graphs_.begin(), end) == kMostShapes) {
    graphs_.erase(graphs_.begin(), end);  // those of generations stay
  }
  return &graph_of(key);
}

/// Attention reads `sequences` before it waits for the kernels ahead. embed() always comes between,
/// and lets nothing begin until the inputs are there.
void CudaTransformer::send(const StepInputs& inputs) {
  launch("inputs", 1, inputs.bytes(), 0, [&] { inputs.send(stream_); });
}

void CudaTransformer::forward(const TokenBatch& batch, KvCache* any_cache) {
  check(batch, any_cache);
  PagedKvCache* const cache = checked(any_cache);
  reserve(batch.num_tokens());
  const OnDevice on_device(*this);
  // Room that would drop the graphs if it came later.
  reserve_rows(spec_.has_pooler ? static_cast<std::int64_t>(batch.sequences().size()) : 0);
  std::int64_t longest = cache == nullptr ? 0 : cache->capacity();
  for (const kernels::AttentionSequence& sequence : batch.sequences()) {
    longest = std::max(longest, sequence.num_tokens);
  }
  reserve_positions(longest);
  StepGraph* const graph = cache == nullptr && uses_graphs() ? forward_graph(batch) : nullptr;
  const Step step =
      begin_step(batch, cache, graph == nullptr ? eager_inputs(batch, 0) : graph->inputs());
  const auto run = [&] {
    send(step.inputs);
    run_layers(step);
  };
  if (graph != nullptr && graph->captured()) {
    graph->launch(stream_);
    num_tokens_ = step.num_tokens;
    x_ = rows_of_x(num_tokens_);
  } else {
    run();  // the first time: it also loads the kernels, which a capture must not
    if (graph != nullptr) {
      capture(*graph, run);
    }
  }
  if (cache != nullptr) {
    for (const kernels::AttentionSequence& sequence : batch.sequences()) {
      cache->advance(sequence.slot, sequence.num_tokens);
    }
  }
}

}  // namespace moq::inference::cuda
