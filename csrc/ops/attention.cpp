// moq::attention over packed rows and moq::paged_attention over a cache.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/kv_pages.h"
#include "csrc/ops/quantizer.h"
#include "kernels/attention.h"

namespace moq::ops {
namespace {

using at::Tensor;
using kernels::AttentionSequence;
using kernels::DeviceSequence;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kPacked = "attention";
constexpr const char* kPaged = "paged_attention";

/// What both forms share.
struct AttentionCall {
  const char* where;
  Tensor query;  ///< [num_tokens, num_heads, head_dim]: a view of the packed rows, or as given
  Tensor keys;   ///< packed rows [num_tokens, num_kv_heads, head_dim], also views
  Tensor values;
  KvPages pages;
  OptionalTensor page_table;
  Tensor sequences;
  std::int64_t max_tokens;
  std::int64_t num_kv_heads;
  bool causal;
  double scale;
  OptionalTensor alibi_slopes;
  bool past_is_ready = false;
};

// ------------------------------------------------------------------------------------------ checks

void check(const AttentionCall& call) {
  const at::Device device = call.query.device();
  const std::int64_t num_heads = known_size(call.query, 1);
  const std::int64_t head_dim = known_size(call.query, 2);
  constexpr std::int64_t kMaxHeadDim = kernels::cuda::kMaxHeadDim;
  TORCH_CHECK_VALUE(call.num_kv_heads > 0 && num_heads > 0 && num_heads % call.num_kv_heads == 0,
                    call.where, ": num_heads must be a multiple of num_kv_heads, got ", num_heads,
                    " and ", call.num_kv_heads);
  TORCH_CHECK_VALUE(head_dim >= 1 && head_dim <= kMaxHeadDim, call.where,
                    ": head_dim must be in [1, ", kMaxHeadDim, "], got ", head_dim);
  TORCH_CHECK_VALUE(call.sequences.dim() == 2, call.where,
                    ": sequences must be [num_sequences, 4], got ", call.sequences.dim(),
                    " dimensions");
  check_tensor(call.where, "sequences", call.sequences, at::kInt, device,
               SymSizes<2>{call.sequences.sym_size(0), 4});
  check_contiguous(call.where, "sequences", call.sequences);
  TORCH_CHECK_VALUE(call.max_tokens >= 0, call.where, ": max_tokens must be >= 0, got ",
                    call.max_tokens);
  check_tensor(call.where, "alibi_slopes", call.alibi_slopes, at::kFloat, device,
               SymSizes<1>{num_heads});
}

double scale_or_default(std::optional<double> scale, std::int64_t head_dim) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
}

AttentionCall describe_packed(const Tensor& qkv, const Tensor& sequences, std::int64_t num_heads,
                              std::int64_t num_kv_heads, std::int64_t max_tokens, bool causal,
                              std::optional<double> scale, const OptionalTensor& alibi_slopes) {
  check_activations(kPacked, "qkv", qkv);
  const std::int64_t head_dim = head_dim_of(kPacked, qkv, num_heads, num_kv_heads);
  const auto heads = [&](std::int64_t first, std::int64_t count) {
    return qkv.narrow(1, first * head_dim, count * head_dim).unflatten(1, {count, head_dim});
  };
  AttentionCall call{.where = kPacked,
                     .query = heads(0, num_heads),
                     .keys = heads(num_heads, num_kv_heads),
                     .values = heads(num_heads + num_kv_heads, num_kv_heads),
                     .pages = {},
                     .page_table = std::nullopt,
                     .sequences = sequences,
                     .max_tokens = max_tokens,
                     .num_kv_heads = num_kv_heads,
                     .causal = causal,
                     .scale = scale_or_default(scale, head_dim),
                     .alibi_slopes = alibi_slopes};
  check(call);
  return call;
}

AttentionCall describe_paged(const Tensor& query, const Tensor& key_pages,
                             const Tensor& value_pages, const Tensor& page_table,
                             const Tensor& sequences, std::int64_t max_tokens, bool causal,
                             std::optional<double> scale, const OptionalTensor& key_scales,
                             const OptionalTensor& value_scales, const OptionalTensor& alibi_slopes,
                             bool past_is_ready) {
  refuse_cpu_pages(kPaged, query);
  check_activations(kPaged, "query", query);
  TORCH_CHECK_VALUE(query.dim() == 3, kPaged,
                    ": query must be [num_tokens, num_heads, head_dim], got ", query.dim(),
                    " dimensions");
  const std::int64_t head_dim = known_size(query, 2);
  AttentionCall call{.where = kPaged,
                     .query = query,
                     .keys = {},
                     .values = {},
                     .pages = {.keys = key_pages,
                               .values = value_pages,
                               .key_scales = key_scales,
                               .value_scales = value_scales},
                     .page_table = page_table,
                     .sequences = sequences,
                     .max_tokens = max_tokens,
                     .num_kv_heads = kv_heads_of(kPaged, key_pages),
                     .causal = causal,
                     .scale = scale_or_default(scale, head_dim),
                     .alibi_slopes = alibi_slopes,
                     .past_is_ready = past_is_ready};
  check(call);
  check(kPaged, call.pages, query, call.num_kv_heads, head_dim);
  TORCH_CHECK_VALUE(page_table.dim() == 2, kPaged, ": page_table must be [slots, pages], got ",
                    page_table.dim(), " dimensions");
  check_tensor(kPaged, "page_table", page_table, at::kInt, query.device(), page_table.sym_sizes());
  check_contiguous(kPaged, "page_table", page_table);
  return call;
}

// ---------------------------------------------------------------------------------- implementation

/// [num_tokens, num_heads * head_dim], or in three dimensions as the query came.
Tensor empty_output(const AttentionCall& call) {
  return at::empty_symint(call.query.sym_sizes(), call.query.options());
}

/// Sequences in host memory whose keys are packed rows.
std::vector<AttentionSequence> packed_sequences(const AttentionCall& call) {
  const auto rows = call.sequences.accessor<std::int32_t, 2>();
  std::vector<AttentionSequence> result;
  for (std::int64_t i = 0; i < rows.size(0); ++i) {
    const std::int64_t begin = rows[i][0];
    const std::int64_t tokens = rows[i][1];
    TORCH_CHECK_VALUE(begin >= 0 && tokens >= 0 && tokens <= call.max_tokens &&
                          begin + tokens <= call.query.size(0) && rows[i][2] == 0,
                      kPacked, ": a sequence must have at most ", call.max_tokens, " of the ",
                      call.query.size(0), " tokens and no past, got tokens from ", begin, " to ",
                      begin + tokens, " and a past of ", rows[i][2]);
    result.push_back({.token_begin = begin, .num_tokens = tokens, .slot = begin, .past_length = 0});
  }
  return result;
}

void run_on_cpu(const AttentionCall& call, const Tensor& output) {
  const auto sequences = packed_sequences(call);
  const OptionalTensor slopes = contiguous(call.alibi_slopes);
  const std::int64_t head_dim = call.query.size(2);
  const std::int64_t width = call.keys.stride(0);
  kernels::cpu::attention({.query = call.query.const_data_ptr<float>(),
                           .query_stride = call.query.stride(0),
                           .keys = call.keys.const_data_ptr<float>(),
                           .values = call.values.const_data_ptr<float>(),
                           .slot_stride = width,
                           .kv_head_stride = head_dim,
                           .key_stride = width,
                           .sequences = sequences.data(),
                           .num_sequences = static_cast<std::int64_t>(sequences.size()),
                           .num_heads = call.query.size(1),
                           .num_kv_heads = call.num_kv_heads,
                           .head_dim = head_dim,
                           .causal = call.causal,
                           .scale = static_cast<float>(call.scale),
                           .alibi_slopes = data_or_null<float>(slopes),
                           .output = output.mutable_data_ptr<float>(),
                           .output_stride = output.stride(0)});
}

Tensor run(AttentionCall call) {
  // Rows may lie apart, but a row's heads are one behind the other.
  const auto whole = [](const Tensor& heads) {
    return heads.stride(2) == 1 && heads.stride(1) == heads.size(2);
  };
  if (!whole(call.query)) {
    call.query = call.query.contiguous();
  }
  if (call.keys.defined() && !whole(call.keys)) {
    call.keys = call.keys.contiguous();
    call.values = call.values.contiguous();
  }
  Tensor output = empty_output(call);
  run_on(
      call.where, call.query.device(), [&] { run_on_cpu(call, output); },
      [&](auto stream) {
        const OptionalTensor slopes = contiguous(call.alibi_slopes);
        const auto* sequences = call.sequences.const_data_ptr();
        const bool packed = call.keys.defined();
        kernels::cuda::attention({.query = call.query.const_data_ptr(),
                                  .query_stride = call.query.stride(0),
                                  .pages = describe(call.pages),
                                  .page_table = data_or_null<std::int32_t>(call.page_table),
                                  .page_table_stride = packed ? 0 : call.page_table->size(1),
                                  .packed_keys = packed ? call.keys.const_data_ptr() : nullptr,
                                  .packed_values = packed ? call.values.const_data_ptr() : nullptr,
                                  .packed_stride = packed ? call.keys.stride(0) : 0,
                                  .sequences = static_cast<const DeviceSequence*>(sequences),
                                  .num_sequences = call.sequences.size(0),
                                  .max_tokens = call.max_tokens,
                                  .num_heads = call.query.size(1),
                                  .num_kv_heads = call.num_kv_heads,
                                  .head_dim = call.query.size(2),
                                  .causal = call.causal,
                                  .scale = static_cast<float>(call.scale),
                                  .alibi_slopes = data_or_null<float>(slopes),
                                  .output = output.mutable_data_ptr(),
                                  .output_stride = output.stride(0),
                                  .dtype = dtype_of(call.query.scalar_type()),
                                  .past_is_ready = call.past_is_ready},
                                 stream);
      });
  return output;
}

using PackedAttention = Described<&describe_packed, &run, &empty_output>;
using PagedAttention = Described<&describe_paged, &run, &empty_output>;

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kPacked, PackedAttention::on_device);
  m.impl(kPaged, PagedAttention::on_device);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kPacked, PackedAttention::on_device);
  m.impl(kPaged, PagedAttention::on_device);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kPacked, PackedAttention::on_meta);
  m.impl(kPaged, PagedAttention::on_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kPacked, torch::autograd::autogradNotImplementedFallback());
  m.impl(kPaged, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moq::ops
