// Sampling from logits, as the engine's generation loop does it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels/common/parallel.h"
#include "kernels/sampling.h"

namespace moq {
namespace {

using at::Tensor;

// ----------------------------------------------------------------------------------------- checks

void check(const Tensor& logits, const std::optional<Tensor>& history) {
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat, "sample: logits must be float32, got ",
                   logits.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() == 2, "sample: logits must be [batch, vocabulary], got ",
                    logits.dim(), " dimensions");
  if (history.has_value()) {
    TORCH_CHECK_TYPE(history->scalar_type() == at::kLong, "sample: history must be int64, got ",
                     history->scalar_type());
    TORCH_CHECK_VALUE(history->dim() == 2 && history->sym_size(0) == logits.sym_size(0),
                      "sample: history must be [batch, length] with the batch of logits, got ",
                      history->sym_sizes(), " and ", logits.sym_sizes());
  }
}

// -------------------------------------------------------------------------------------------- CPU

std::tuple<Tensor, Tensor> sample_cpu(const Tensor& logits, const std::optional<Tensor>& history,
                                      double temperature, int64_t top_k, double top_p, double min_p,
                                      double repetition_penalty, int64_t seed, int64_t step) {
  check(logits, history);
  const Tensor contiguous_logits = logits.contiguous();
  const std::optional<Tensor> contiguous_history =
      history.has_value() ? std::optional(history->contiguous()) : std::nullopt;
  std::vector<kernels::SamplingRow> rows(static_cast<std::size_t>(logits.size(0)));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = {.params = {.temperature = static_cast<float>(temperature),
                          .top_k = top_k,
                          .top_p = static_cast<float>(top_p),
                          .min_p = static_cast<float>(min_p),
                          .repetition_penalty = static_cast<float>(repetition_penalty),
                          .seed = static_cast<std::uint64_t>(seed)},
               .stream = static_cast<std::uint32_t>(i),
               .step = static_cast<std::uint64_t>(step)};
    if (contiguous_history.has_value()) {
      rows[i].history_length = contiguous_history->size(1);
      rows[i].history = contiguous_history->const_data_ptr<int64_t>() +
                        static_cast<int64_t>(i) * rows[i].history_length;
    }
  }
  Tensor tokens = at::empty({logits.size(0)}, logits.options().dtype(at::kLong));  // [batch]
  Tensor probabilities = at::empty_like(contiguous_logits);  // [batch, vocabulary]
  const kernels::ThreadScope scope(at::get_num_threads());
  kernels::cpu::sample({.logits = contiguous_logits.const_data_ptr<float>(),
                        .batch_size = logits.size(0),
                        .vocab_size = logits.size(1),
                        .logits_stride = logits.size(1),
                        .rows = rows.data(),
                        .tokens = tokens.mutable_data_ptr<int64_t>(),
                        .probabilities = probabilities.mutable_data_ptr<float>()});
  return {tokens, probabilities};
}

// ------------------------------------------------------------------------------------------- Meta

std::tuple<Tensor, Tensor> sample_meta(const Tensor& logits, const std::optional<Tensor>& history,
                                       double /*temperature*/, int64_t /*top_k*/, double /*top_p*/,
                                       double /*min_p*/, double /*repetition_penalty*/,
                                       int64_t /*seed*/, int64_t /*step*/) {
  check(logits, history);
  return {at::empty_symint({logits.sym_size(0)}, logits.options().dtype(at::kLong)),
          at::empty_symint(logits.sym_sizes(), logits.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl("sample", sample_cpu);
}

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl("sample", sample_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl("sample", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moq
