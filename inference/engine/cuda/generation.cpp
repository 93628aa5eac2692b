// The steps of a generation on a GPU.
#include <c10/util/ScopeExit.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <numeric>

#include "inference/engine/cuda/on_device.h"
#include "inference/engine/cuda/transformer.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/sampling.h"

namespace moq::inference::cuda {
namespace {

/// Whether no row is drawn at random or has a penalty.
bool all_greedy(std::span<const kernels::SamplingRow> sampling) {
  return std::all_of(sampling.begin(), sampling.end(), [](const kernels::SamplingRow& row) {
    return row.params.temperature == 0.0F && row.params.repetition_penalty == 1.0F;
  });
}

}  // namespace

bool uses_graphs() {
  static const char* const forbidden = std::getenv("MOQ_GPU_GRAPHS");
  return forbidden == nullptr || std::atoi(forbidden) != 0;
}

std::int64_t bucket_of(std::int64_t num_rows) {
  constexpr std::int64_t kStep = 16;
  return num_rows <= kStep
             ? static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(num_rows)))
             : (num_rows + kStep - 1) / kStep * kStep;
}

std::span<const std::int64_t> CudaTransformer::next_tokens(
    const TokenBatch& batch, KvCache& any_cache, std::span<const std::int64_t> rows,
    std::span<const kernels::SamplingRow> sampling) {
  check(batch, &any_cache);
  PagedKvCache& cache = *checked(&any_cache);
  for (const std::int64_t row : rows) {
    check_row(row, batch.num_tokens());
  }
  const auto count = static_cast<std::int64_t>(rows.size());
  const bool decoding = &cache == generation_cache_.get() && count == batch.num_tokens();
  const std::int64_t bucket = decoding ? bucket_of(count) : batch.num_tokens();
  reserve(bucket);
  const OnDevice on_device(*this);
  reserve_rows(decoding ? bucket : count);
  reserve_positions(cache.capacity());
  if (decoding) {
    decode(batch, cache, bucket, sampling);
  } else {
    StepInputs& inputs = *eager_inputs(batch, count);
    const Step step = begin_step(batch, &cache, eager_inputs_);
    inputs.write_rows(rows);
    write_sampling(inputs, batch, rows, sampling);
    run_step(step, inputs.rows(), count, all_greedy(sampling));
  }
  for (const kernels::AttentionSequence& sequence : batch.sequences()) {
    cache.advance(sequence.slot, sequence.num_tokens);
  }
  synchronize("a generation step", batch.num_tokens());
  take_tokens(sampling);
  return drawn_;
}

/// Everything that a step does on the device: what a graph captures.
void CudaTransformer::run_step(const Step& step, const std::int32_t* rows, std::int64_t count,
                               bool all_greedy) {
  send(step.inputs);
  run_layers(step);
  if (count == 0) {
    return;
  }
  const at::Tensor drawn_from = logits_.narrow(0, 0, count);
  run_head(workspace_.x, rows, drawn_from);
  launch("sampling", count, spec_.vocab_size, count * spec_.vocab_size * 4, [&] {
    kernels::cuda::sample(
        {.logits = drawn_from.const_data_ptr<float>(),
         .batch_size = count,
         .vocab_size = spec_.vocab_size,
         .logits_stride = drawn_from.stride(0),
         .rows = step.inputs.sampling(),
         .seen =
             seen_.defined() ? reinterpret_cast<std::uint32_t*>(seen_.mutable_data_ptr()) : nullptr,
         .tokens = tokens_.mutable_data_ptr<std::int32_t>(),
         .all_greedy = all_greedy},
        stream_);
  });
  MOQ_CUDA_CHECK(cudaMemcpyAsync(pinned_tokens_.mutable_data_ptr(), tokens_.const_data_ptr(),
                                 static_cast<std::size_t>(count) * sizeof(std::int32_t),
                                 cudaMemcpyDeviceToHost, stream_));
}

/// A step of one token a row, all of which are drawn from: by the graph of its bucket.
void CudaTransformer::decode(const TokenBatch& batch, PagedKvCache& cache, std::int64_t bucket,
                             std::span<const kernels::SamplingRow> sampling) {
  const StepGraph::Key key{
      .cache = cache.id(),
      .num_tokens = bucket,
      .num_decoding = bucket,
      .max_tokens = 1,
      .all_greedy = all_greedy(sampling),
      .one_kernel = bucket == 1 && takes_one_kernel(batch.sequences()[0].past_length)};
  StepGraph& graph = graph_of(key);
  StepInputs& inputs = *graph.inputs();
  Step step = begin_step(batch, &cache, graph.inputs());
  inputs.pad(bucket, bucket);
  std::vector<std::int64_t> rows(batch.sequences().size());
  std::iota(rows.begin(), rows.end(), 0);
  write_sampling(inputs, batch, rows, sampling);
  step.num_tokens = step.num_decoding = bucket;
  const auto run = [&] { run_step(step, /*rows=*/nullptr, bucket, key.all_greedy); };
  if (graph.captured()) {
    graph.launch(stream_);
    num_tokens_ = bucket;
    return;
  }
  decode_kernels_.clear();
  recording_ = true;
  {
    const auto stop = c10::make_scope_exit([&] { recording_ = false; });
    run();  // the first time: it also loads the kernels, which a capture must not
  }
  if (uses_graphs()) {
    capture(graph, run);
  }
}

/// What is drawn from each row. A row that starts with a penalty brings the tokens of its prompt.
void CudaTransformer::write_sampling(StepInputs& inputs, const TokenBatch& batch,
                                     std::span<const std::int64_t> rows,
                                     std::span<const kernels::SamplingRow> sampling) {
  std::vector<kernels::DeviceSamplingRow> device_rows(static_cast<std::size_t>(inputs.max_rows()));
  const std::int64_t first_spare = seen_.defined() ? seen_.size(0) / 2 : 0;
  for (std::size_t i = 0; i < device_rows.size(); ++i) {
    device_rows[i].history_row =
        static_cast<std::uint32_t>(first_spare) + static_cast<std::uint32_t>(i);
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto& sequences = batch.sequences();
    const auto sequence =
        std::find_if(sequences.begin(), sequences.end(), [&](const auto& candidate) {
          return rows[i] < candidate.token_begin + candidate.num_tokens;
        });
    device_rows[i] = {.params = sampling[i].params,
                      .step = sampling[i].step,
                      .stream = sampling[i].stream,
                      .history_row = static_cast<std::uint32_t>(sequence->slot)};
    if (sampling[i].step == 0 && sampling[i].params.repetition_penalty != 1.0F) {
      write_history(sequence->slot,
                    {sampling[i].history, static_cast<std::size_t>(sampling[i].history_length)});
    }
  }
  inputs.write_sampling(device_rows);
}

/// Tells the device which tokens a slot's sequence has.
void CudaTransformer::write_history(std::int64_t slot, std::span<const std::int64_t> tokens) {
  std::vector<std::uint32_t> words(static_cast<std::size_t>(seen_.size(1)), 0);
  for (const std::int64_t token : tokens) {
    words[static_cast<std::size_t>(token / kHistoryWordBits)] |= 1U << token % kHistoryWordBits;
  }
  MOQ_CUDA_CHECK(cudaMemcpyAsync(seen_[slot].mutable_data_ptr(), words.data(),
                                 words.size() * sizeof(std::uint32_t), cudaMemcpyHostToDevice,
                                 stream_));
}

void CudaTransformer::take_tokens(std::span<const kernels::SamplingRow> sampling) {
  drawn_.clear();
  if (sampling.empty()) {
    return;
  }
  const auto* const tokens = pinned_tokens_.const_data_ptr<std::int32_t>();
  drawn_.assign(tokens, tokens + sampling.size());
  for (std::size_t i = 0; i < sampling.size(); ++i) {
    MOQ_CHECK(
        drawn_[i] != kernels::DeviceSamplingArgs::kNoToken,
        "generate: every logit must be a number below infinity, and one above -infinity, got ",
        "a NaN or an infinity for new token ", sampling[i].step, " of prompt ", sampling[i].stream,
        dtype_ == DType::kFloat16 ? ": float16 activations end at 65504, try compute_dtype=\"bf16\""
                                  : "");
  }
}

}  // namespace moq::inference::cuda
