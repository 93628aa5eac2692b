#include "inference/engine/cuda/transformer.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "inference/engine/cuda/device_memory.h"
#include "inference/engine/cuda/on_device.h"
#include "kernels/common/check.h"
#include "kernels/sampling.h"

namespace moq::inference::cuda {
namespace {

constexpr std::int64_t kFewestRows = 16;     // whose logits there is room for
constexpr std::int64_t kCapacityStep = 256;  // tokens; capacities of kept caches are multiples
constexpr std::int64_t kWordBits = 32;

std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

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
}

/// Nothing may be running when the weights' memory is given back.
CudaTransformer::~CudaTransformer() {
  (void)cudaStreamSynchronize(stream_);
}

MemoryReport CudaTransformer::memory() const {
  MemoryReport report{.weights = weight_bytes(weights_) + device_weights_.bytes(),
                      .kv_cache = generation_cache_ ? generation_cache_->bytes() : 0,
                      .workspace = workspace_.bytes()};
  for (const at::Tensor* tensor :
       {&cos_, &sin_, &head_in_, &logits_, &all_logits_, &joined_, &tokens_, &seen_}) {
    report.workspace += tensor->defined() ? static_cast<std::int64_t>(tensor->nbytes()) : 0;
  }
  report.workspace += eager_inputs_ ? eager_inputs_->bytes() : 0;
  for (const auto& [key, graph] : graphs_) {
    report.workspace += graph.inputs().bytes();
  }
  return report;
}

std::unique_ptr<KvCache> CudaTransformer::make_cache(std::int64_t num_slots,
                                                     std::int64_t capacity) const {
  const c10::cuda::CUDAStreamGuard guard(stream_);
  return std::make_unique<PagedKvCache>(spec_.num_layers, kv_heads(), spec_.head_dim, num_slots,
                                        capacity, kv_dtype_);
}

KvCache& CudaTransformer::generation_cache(std::int64_t num_slots, std::int64_t capacity) {
  if (generation_cache_ && generation_cache_->num_slots() >= num_slots &&
      generation_cache_->capacity() >= capacity) {
    return *generation_cache_;
  }
  const OnDevice on_device(*this);
  if (generation_cache_) {  // never two of them, nor again a smaller one
    num_slots = std::max(num_slots, generation_cache_->num_slots());
    capacity = std::max(capacity, generation_cache_->capacity());
    drop_graphs();
    generation_cache_.reset();
  }
  capacity = std::min(round_up(capacity, kCapacityStep), spec_.max_positions);
  generation_cache_ = std::make_unique<PagedKvCache>(spec_.num_layers, kv_heads(), spec_.head_dim,
                                                     num_slots, capacity, kv_dtype_);
  // Twice as many rows: those that fill up a batch have one of their own each.
  seen_ = at::empty({2 * bucket_of(num_slots), round_up(spec_.vocab_size, kWordBits) / kWordBits},
                    at::TensorOptions(at::kInt).device(device_));
  return *generation_cache_;
}

// ---- room

void CudaTransformer::reserve(std::int64_t num_tokens) {
  if (num_tokens <= workspace_.max_tokens) {
    return;
  }
  const OnDevice on_device(*this);
  drop_graphs();
  workspace_.plan(num_tokens, {.hidden = spec_.hidden_size,
                               .qkv = qkv_width(),
                               .query = q_heads() * spec_.head_dim,
                               .inner = weights_.ffn.size(),
                               .element_bytes = static_cast<std::int64_t>(size_of(dtype_))});
}

void CudaTransformer::reserve_rows(std::int64_t num_rows) {
  const std::int64_t room = head_in_.defined() ? head_in_.size(1) : 0;
  if (num_rows <= room) {
    return;
  }
  num_rows = std::max({num_rows, kFewestRows, room});
  drop_graphs();
  const auto options = at::TensorOptions(at::kFloat).device(device_);
  const auto& widths = weights_.vocab_widths;
  head_in_ = at::empty({2, num_rows, spec_.hidden_size}, options.dtype(scalar_type(dtype_)));
  tokens_ = at::empty({num_rows}, options.dtype(at::kInt));
  pinned_tokens_ = at::empty({num_rows}, at::TensorOptions(at::kInt).pinned_memory(true));
  if (!spec_.has_head) {
    return;
  }
  const std::int64_t widest = *std::max_element(widths.begin(), widths.end());
  logits_ = at::empty({num_rows, widest}, options);
  if (group_) {
    all_logits_ = at::empty({communicator_->size(), num_rows, widest}, options);
    joined_ = at::empty({num_rows, spec_.vocab_size}, options);
  }
}

void CudaTransformer::reserve_positions(std::int64_t num_positions) {
  if (spec_.positions != PositionKind::kRotary || num_positions <= rotation_.num_positions()) {
    return;
  }
  const std::int64_t last = num_positions - 1;
  rotation_.reserve(spec_, {&last, 1});
  drop_graphs();
  const auto size = static_cast<std::size_t>(rotation_.num_positions() * spec_.rotary_dim() / 2);
  cos_ = upload(std::as_bytes(std::span(rotation_.cos(), size)), "the workspace");
  sin_ = upload(std::as_bytes(std::span(rotation_.sin(), size)), "the workspace");
}

// ---- errors

/// Remembers an error that the GPU does not recover from.
void CudaTransformer::note_failure() {
  const cudaError_t status = cudaStreamQuery(stream_);
  if (status != cudaSuccess && status != cudaErrorNotReady &&
      status != cudaErrorStreamCaptureUnsupported && status != cudaErrorStreamCaptureInvalidated) {
    failure_ = cudaGetErrorString(status);
  }
}

void CudaTransformer::synchronize(const char* what, std::int64_t num_tokens) {
  const cudaError_t status = cudaStreamSynchronize(stream_);
  if (status != cudaSuccess) {
    failure_ = cudaGetErrorString(status);
    moq::detail::fail("engine: ", what, " of ", num_tokens, " tokens must succeed on ",
                      device_.str(), ", got \"", failure_,
                      "\" from one of its kernels: CUDA_LAUNCH_BLOCKING=1 tells which. The engine ",
                      "is unusable now");
  }
}

}  // namespace moq::inference::cuda
