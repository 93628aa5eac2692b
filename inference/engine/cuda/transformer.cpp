#include "inference/engine/cuda/transformer.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "inference/engine/cuda/device_memory.h"
#include "inference/engine/cuda/on_device.h"
#include "inference/engine/cuda/outside_captures.h"
#include "inference/engine/positions.h"
#include "kernels/common/check.h"
#include "kernels/common/integer_math.h"

namespace moq::inference::cuda {
namespace {

constexpr std::int64_t kFewestRows = 16;     // whose logits there is room for
constexpr std::int64_t kCapacityStep = 256;  // tokens; capacities of kept caches are multiples

}  // namespace

CudaTransformer::CudaTransformer(ModelSpec spec, Weights weights,
                                 std::shared_ptr<Communicator> communicator,
                                 std::unique_ptr<DeviceGroup> group, at::Device device, DType dtype,
                                 DType kv_dtype)
    : Transformer(std::move(spec), std::move(weights), std::move(communicator)),
      device_(device),
      dtype_(dtype),
      kv_dtype_(kv_dtype),
      stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())),
      group_(std::move(group)),
      device_weights_(spec_, weights_, dtype) {
  for_each_linear(weights_, [](Linear& linear) { linear.bias = {}; });
  device_weights_.alibi_slopes = device_weights_.keep(own_alibi_slopes());
  prepare_decode_step();
}

/// Nothing may be running when the weights' memory is given back.
CudaTransformer::~CudaTransformer() {
  const CaptureMode mode(cudaStreamCaptureModeRelaxed);
  (void)cudaStreamSynchronize(stream_);
  drop_graphs();
}

std::unique_ptr<DeviceScope> CudaTransformer::outside_captures() const {
  return std::make_unique<OutsideCaptures>(device_);
}

std::unique_ptr<DeviceScope> CudaTransformer::in_one_go() {
  return std::make_unique<HandOver>(*this);
}

void CudaTransformer::release_graphs() {
  const CaptureMode mode(cudaStreamCaptureModeRelaxed);
  drop_graphs();
}

MemoryReport CudaTransformer::memory() const {
  MemoryReport report{.weights = weight_bytes(weights_) + device_weights_.bytes(),
                      .kv_cache = generation_cache_ ? generation_cache_->bytes() : 0,
                      .workspace = workspace_.bytes()};
  for (const at::Tensor* tensor : {&decode_state_, &cos_, &sin_, &head_in_, &logits_, &own_logits_,
                                   &all_logits_, &tokens_, &seen_}) {
    report.workspace += tensor->defined() ? static_cast<std::int64_t>(tensor->nbytes()) : 0;
  }
  report.workspace += eager_inputs_ ? eager_inputs_->bytes() : 0;
  for (const auto& [key, graph] : graphs_) {
    report.workspace += graph.inputs()->bytes();
  }
  return report;
}

std::unique_ptr<PagedKvCache> CudaTransformer::new_cache(std::int64_t num_slots,
                                                         std::int64_t capacity) const {
  return std::make_unique<PagedKvCache>(spec_.num_layers, kv_heads(), spec_.head_dim, num_slots,
                                        capacity, kv_dtype_);
}

std::unique_ptr<KvCache> CudaTransformer::make_cache(std::int64_t num_slots,
                                                     std::int64_t capacity) {
  const OnDevice on_device(*this);
  std::unique_ptr<KvCache> cache;
  on_all_ranks(*communicator_, "a KV cache", [&] { cache = new_cache(num_slots, capacity); });
  return cache;
}

/// Makes the cache that generations use.
KvCache& CudaTransformer::keep_cache(std::int64_t num_slots, std::int64_t capacity) {
  std::unique_ptr<PagedKvCache> cache;
  at::Tensor seen;
  on_all_ranks(*communicator_, "the KV cache", [&] {
    // Twice as many rows: those that fill up a batch have one of their own each. Before the cache,
    // which then counts what is left.
    const std::int64_t words = divide_up(spec_.vocab_size, kHistoryWordBits);
    seen = allocate({2 * bucket_of(num_slots), words}, at::kInt, "the KV cache",
                    would_fit("sequences at once", num_slots, 2 * words * 4));
    cache = new_cache(num_slots, capacity);
  });
  generation_cache_ = std::move(cache);
  seen_ = std::move(seen);
  return *generation_cache_;
}

KvCache& CudaTransformer::generation_cache(std::int64_t num_slots, std::int64_t capacity) {
  if (generation_cache_ && generation_cache_->num_slots() >= num_slots &&
      generation_cache_->capacity() >= capacity) {
    return *generation_cache_;
  }
  constexpr std::int64_t kMostWords = kernels::DeviceSamplingArgs::kMaxVocabulary;
  MOQ_CHECK(spec_.vocab_size <= kMostWords, "generate: vocab_size must be <= ", kMostWords,
            " on a GPU, got ", spec_.vocab_size, ": device=\"cpu\" has no such limit");
  const OnDevice on_device(*this);
  capacity = std::min(round_up(capacity, kCapacityStep), spec_.max_positions);
  const std::int64_t held_slots = generation_cache_ ? generation_cache_->num_slots() : 0;
  const std::int64_t held_capacity = generation_cache_ ? generation_cache_->capacity() : 0;
  drop_graphs();
  generation_cache_.reset();  // never two of them
  // One that serves both this request and the last one spares the next one the wait, unless the
  // two are too different for that: long sequences, then many.
  const std::int64_t most_slots = std::max(num_slots, held_slots);
  const std::int64_t longest = std::max(capacity, held_capacity);
  if (held_slots > 0 &&
      most_slots * longest <= 2 * std::max(num_slots * capacity, held_slots * held_capacity)) {
    try {
      return keep_cache(most_slots, longest);
    } catch (const Error&) {  // what is asked for may fit by itself
    }
  }
  return keep_cache(num_slots, capacity);
}

// ---- room. What does not fit on one rank leaves all of them without.

at::Tensor CudaTransformer::new_result(at::IntArrayRef sizes) const {
  const c10::cuda::CUDAGuard guard(device_);
  const std::int64_t row_bytes = sizes[1] * static_cast<std::int64_t>(sizeof(float));
  return allocate(sizes, at::kFloat, "the result",
                  would_fit("tokens or sequences at once", sizes[0], row_bytes));
}

void CudaTransformer::reserve(std::int64_t num_tokens) {
  if (num_tokens <= workspace_.max_tokens) {
    return;
  }
  const OnDevice on_device(*this);
  drop_graphs();
  num_tokens_ = 0;
  x_ = at::Tensor();
  workspace_ = {};  // its memory first
  Workspace larger;
  on_all_ranks(*communicator_, "the workspace", [&] {
    larger.plan(num_tokens, {.hidden = spec_.hidden_size,
                             .qkv = qkv_width(),
                             .query = q_heads() * spec_.head_dim,
                             .inner = weights_.ffn.size(),
                             .element_bytes = static_cast<std::int64_t>(size_of(dtype_))});
  });
  workspace_ = std::move(larger);
}

void CudaTransformer::reserve_rows(std::int64_t num_rows) {
  if (num_rows <= max_rows_) {
    return;
  }
  num_rows = std::max(num_rows, kFewestRows);
  drop_graphs();
  max_rows_ = 0;
  head_in_ = tokens_ = logits_ = own_logits_ = all_logits_ = at::Tensor();  // their memory first
  const std::int64_t widest = spec_.has_head ? std::ranges::max(weights_.vocab_widths) : 0;
  const std::int64_t logits_of_a_row =
      (spec_.has_head ? spec_.vocab_size : 0) + (group_ ? (1 + communicator_->size()) * widest : 0);
  const std::int64_t row_bytes =
      2 * spec_.hidden_size * static_cast<std::int64_t>(size_of(dtype_)) +
      static_cast<std::int64_t>(sizeof(float)) * logits_of_a_row;
  std::int64_t held = 0;  // by the parts that have been allocated
  const auto room = [&](at::IntArrayRef sizes, at::ScalarType type) {
    at::Tensor part = allocate(sizes, type, "the workspace", [&](std::int64_t usable) {
      return would_fit("tokens' logits, or sequences, at once", num_rows, row_bytes)(usable + held);
    });
    held += static_cast<std::int64_t>(part.nbytes());
    return part;
  };
  on_all_ranks(*communicator_, "room for logits", [&] {
    head_in_ = room({2, num_rows, spec_.hidden_size}, scalar_type(dtype_));
    tokens_ = room({num_rows}, at::kInt);
    pinned_tokens_ = at::empty({num_rows}, at::TensorOptions(at::kInt).pinned_memory(true));
    if (spec_.has_head) {
      logits_ = room({num_rows, spec_.vocab_size}, at::kFloat);
      if (group_) {
        own_logits_ = room({num_rows, widest}, at::kFloat);
        all_logits_ = room({communicator_->size(), num_rows, widest}, at::kFloat);
      }
    }
  });
  max_rows_ = num_rows;
}

void CudaTransformer::reserve_positions(std::int64_t num_positions) {
  if (spec_.positions != PositionKind::kRotary || num_positions <= num_positions_) {
    return;
  }
  RotationTable table;
  const std::int64_t last = num_positions - 1;
  table.reserve(spec_, {&last, 1});
  const std::int64_t size = table.num_positions() * spec_.rotary_dim() / 2;
  drop_graphs();
  num_positions_ = 0;
  cos_ = sin_ = at::Tensor();  // their memory first
  on_all_ranks(*communicator_, "the table of rotations", [&] {
    // The table has room for more positions than were asked for.
    const std::int64_t position_bytes =
        divide_up(2 * size * static_cast<std::int64_t>(sizeof(float)), num_positions);
    const at::Tensor both = allocate({2, size}, at::kFloat, "the workspace",
                                     would_fit("positions", num_positions, position_bytes));
    cos_ = both[0];
    sin_ = both[1];
    const auto count = static_cast<std::size_t>(size);
    copy_to_device(std::as_bytes(std::span(table.cos(), count)), cos_.mutable_data_ptr());
    copy_to_device(std::as_bytes(std::span(table.sin(), count)), sin_.mutable_data_ptr());
  });
  num_positions_ = table.num_positions();
}

// ---- errors

/// Remembers an error that the GPU does not recover from.
void CudaTransformer::note_failure() {
  const cudaError_t status = cudaStreamQuery(stream_);
  if (status != cudaSuccess && status != cudaErrorNotReady &&
      status != cudaErrorStreamCaptureUnsupported && status != cudaErrorStreamCaptureInvalidated) {
    failure_ = cudaGetErrorString(status);
  }
  if (status != cudaSuccess) {
    (void)cudaGetLastError();  // for others, a stream that is not ready is no error
  }
}

void CudaTransformer::synchronize(const char* what, std::int64_t num_tokens) {
  const cudaError_t status = cudaStreamSynchronize(stream_);
  if (status != cudaSuccess) {
    failure_ = cudaGetErrorString(status);
    moq::detail::fail("engine: ", what, " of ", num_tokens, " tokens must succeed on ",
                      device_.str(), ", got \"", failure_,
                      "\" from one of its kernels: MOQ_GPU_GRAPHS=0 CUDA_LAUNCH_BLOCKING=1 tells ",
                      "which. The engine is unusable now");
  }
  in_flight_ = false;
}

}  // namespace moq::inference::cuda
