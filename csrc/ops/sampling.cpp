// Sampling from logits, as the engine's generation loop does it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "kernels/sampling.h"

namespace moq::ops {
namespace {

using at::Tensor;
using kernels::SamplingParams;

constexpr const char* kName = "sample";

/// The arguments of moq::sample.
struct SampleCall {
  Tensor logits;
  std::optional<Tensor> history;
  SamplingParams params;
  std::uint64_t step;
  bool probabilities;
};

// ----------------------------------------------------------------------------------------- checks

SampleCall describe_call(const Tensor& logits, const std::optional<Tensor>& history,
                         double temperature, std::int64_t top_k, double top_p, double min_p,
                         double repetition_penalty, std::int64_t seed, std::int64_t step,
                         bool probabilities) {
  check_type(kName, "logits", logits, at::kFloat);
  TORCH_CHECK_VALUE(logits.dim() == 2, kName, ": logits must be [batch, vocabulary], got ",
                    logits.dim(), " dimensions");
  if (history.has_value()) {
    check_type(kName, "history", *history, at::kLong);
    check_device(kName, "history", *history, logits.device());
    TORCH_CHECK_VALUE(history->dim() == 2 && history->sym_size(0) == logits.sym_size(0), kName,
                      ": history must be [batch, length] with the batch of logits, got ",
                      history->sym_sizes(), " and ", logits.sym_sizes());
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!probabilities || !logits.is_cuda(), kName,
                              ": probabilities must be False on a GPU, got True; sample from "
                              "logits.cpu() to see the distribution");
  return {.logits = logits,
          .history = history,
          .params = {.temperature = static_cast<float>(temperature),
                     .top_k = top_k,
                     .top_p = static_cast<float>(top_p),
                     .min_p = static_cast<float>(min_p),
                     .repetition_penalty = static_cast<float>(repetition_penalty),
                     .seed = static_cast<std::uint64_t>(seed)},
          .step = static_cast<std::uint64_t>(step),
          .probabilities = probabilities};
}

/// Tokens [batch], and the probabilities, [batch, vocabulary] or, unasked for, [0].
std::tuple<Tensor, Tensor> empty_result(const SampleCall& call) {
  const auto options = call.logits.options();
  return {at::empty_symint({call.logits.sym_size(0)}, options.dtype(at::kLong)),
          call.probabilities ? at::empty_symint(call.logits.sym_sizes(), options)
                             : at::empty({0}, options)};
}

// -------------------------------------------------------------------------------------------- CPU

void run_on_cpu(const SampleCall& call, const Tensor& tokens, const Tensor& probabilities) {
  const Tensor logits = call.logits.contiguous();
  const std::optional<Tensor> history = contiguous(call.history);
  std::vector<kernels::SamplingRow> rows(static_cast<std::size_t>(logits.size(0)));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = {.params = call.params, .stream = static_cast<std::uint32_t>(i), .step = call.step};
    if (history.has_value()) {
      rows[i].history_length = history->size(1);
      rows[i].history = history->const_data_ptr<std::int64_t>() +
                        static_cast<std::int64_t>(i) * rows[i].history_length;
    }
  }
  kernels::cpu::sample(
      {.logits = logits.const_data_ptr<float>(),
       .batch_size = logits.size(0),
       .vocab_size = logits.size(1),
       .logits_stride = logits.size(1),
       .rows = rows.data(),
       .tokens = tokens.mutable_data_ptr<std::int64_t>(),
       .probabilities = call.probabilities ? probabilities.mutable_data_ptr<float>() : nullptr});
}

// -------------------------------------------------------------------------------------------- GPU

#if defined(MOQ_WITH_CUDA)

/// [batch, ceil(vocabulary / 32)] int32: bit t % 32 of word t / 32 of a row says that it has token
/// t.
Tensor seen_tokens(const Tensor& history, std::int64_t vocab_size) {
  constexpr std::int64_t kWordBits = 32;
  const Tensor known = history.ge(0).logical_and(history.lt(vocab_size));
  TORCH_CHECK_VALUE(known.all().item<bool>(), kName, ": history must hold tokens in [0, ",
                    vocab_size, "), got ", history.min().item<std::int64_t>(), " to ",
                    history.max().item<std::int64_t>());
  const std::int64_t batch = history.size(0);
  const std::int64_t words = (vocab_size + kWordBits - 1) / kWordBits;
  const Tensor bits = at::zeros({batch, words * kWordBits}, history.options());
  bits.scatter_(1, history, 1);
  const Tensor places = at::arange(kWordBits, history.options());
  return bits.view({batch, words, kWordBits}).bitwise_left_shift(places).sum(-1).to(at::kInt);
}

void run_on_gpu(const SampleCall& call, const Tensor& tokens, cudaStream_t stream) {
  kernels::check(call.params);
  const Tensor logits = with_whole_rows(call.logits);
  const auto options = logits.options();
  const std::int64_t batch = logits.size(0);
  const std::int64_t vocab_size = logits.size(1);
  if (batch == 0) {
    return;
  }
  std::vector<kernels::DeviceSamplingRow> rows(static_cast<std::size_t>(batch));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = {.params = call.params,
               .step = call.step,
               .stream = static_cast<std::uint32_t>(i),
               .history_row = static_cast<std::uint32_t>(i)};
  }
  const Tensor device_rows =
      at::from_blob(rows.data(), {static_cast<std::int64_t>(rows.size() * sizeof(rows[0]))},
                    at::TensorOptions(at::kByte))
          .to(logits.device());
  const bool has_penalty = call.params.repetition_penalty != 1.0F && call.history.has_value();
  const Tensor seen = has_penalty ? seen_tokens(*call.history, vocab_size) : Tensor();
  const Tensor drawn = at::empty({batch}, options.dtype(at::kInt));
  const auto* row_data = device_rows.const_data_ptr();
  kernels::cuda::sample(
      {.logits = logits.const_data_ptr<float>(),
       .batch_size = batch,
       .vocab_size = vocab_size,
       .logits_stride = logits.stride(0),
       .rows = static_cast<const kernels::DeviceSamplingRow*>(row_data),
       .seen = has_penalty ? static_cast<std::uint32_t*>(seen.mutable_data_ptr()) : nullptr,
       .tokens = drawn.mutable_data_ptr<std::int32_t>(),
       .all_greedy = call.params.temperature == 0.0F && !has_penalty},
      stream);
  tokens.copy_(drawn);
}

#endif

// ---------------------------------------------------------------------------------- implementation

std::tuple<Tensor, Tensor> run(const SampleCall& call) {
  auto result = empty_result(call);
  const Tensor& tokens = std::get<0>(result);
  const Tensor& probabilities = std::get<1>(result);
  run_on(
      kName, call.logits.device(), [&] { run_on_cpu(call, tokens, probabilities); },
      [&](auto stream) { run_on_gpu(call, tokens, stream); });
  return result;
}

using Sample = Described<&describe_call, &run, &empty_result>;

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, Sample::on_device);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, Sample::on_device);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, Sample::on_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moq::ops
