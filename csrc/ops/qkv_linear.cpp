// moq::qkv_linear: the projection of queries, keys and values with all that surrounds it, from the
// norm in front to the cache behind.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/in_place.h"
#include "csrc/ops/kv_pages.h"
#include "csrc/ops/linear_call.h"

namespace moq::ops {
namespace {

using at::Tensor;
using kernels::NormKind;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "qkv_linear";

struct QkvCall {
  LinearCall linear;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  Rotation rotation;
  KvPages pages;
  OptionalTensor cache_rows;
};

QkvCall describe_call(const Tensor& input, const Tensor& packed, std::int64_t num_heads,
                      std::int64_t num_kv_heads, std::int64_t head_dim, std::string_view format,
                      std::optional<std::int64_t> group_size, bool asymmetric,
                      const OptionalTensor& bias, std::optional<std::string_view> norm,
                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                      double epsilon, const OptionalTensor& positions, const OptionalTensor& cos,
                      const OptionalTensor& sin, const OptionalTensor& key_pages,
                      const OptionalTensor& value_pages, const OptionalTensor& cache_rows,
                      bool weight_is_ready) {
  refuse_cpu_pages(kName, input);
  TORCH_CHECK_VALUE(num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0, kName,
                    ": num_heads must be a multiple of num_kv_heads, got ", num_heads, " and ",
                    num_kv_heads);
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim % 2 == 0, kName,
                    ": head_dim must be positive and even, got ", head_dim);
  TORCH_CHECK_VALUE(norm.has_value() == norm_weight.has_value(), kName,
                    ": norm and norm_weight must come together, got one of them");
  QkvCall call{
      .linear = {.where = kName,
                 .input = input,
                 .packed = packed,
                 .shape = shape_of_weight(kName, input, (num_heads + 2 * num_kv_heads) * head_dim,
                                          format, group_size, asymmetric),
                 .bias = bias,
                 .norm = norm.has_value() ? parse_norm(kName, *norm) : NormKind::kNone,
                 .norm_weight = norm_weight,
                 .norm_bias = norm_bias,
                 .epsilon = epsilon,
                 .weight_is_ready = weight_is_ready},
      .num_heads = num_heads,
      .num_kv_heads = num_kv_heads,
      .head_dim = head_dim,
      .rotation = {.positions = positions, .cos = cos, .sin = sin},
      .pages = {.keys = key_pages, .values = value_pages},
      .cache_rows = cache_rows};
  check(call.linear);
  check(kName, call.rotation, input, head_dim);
  check(kName, call.pages, input, num_kv_heads, head_dim);
  TORCH_CHECK_VALUE(key_pages.has_value() == cache_rows.has_value(), kName,
                    ": cache_rows must come with key_pages, got one of them");
  check_tensor(kName, "cache_rows", cache_rows, at::kInt, input.device(),
               SymSizes<1>{input.sym_size(0)});
  if (cache_rows.has_value()) {
    check_contiguous(kName, "cache_rows", *cache_rows);
  }
  return call;
}

/// [m, q | k | v], or [m, q] where k and v go to the cache.
Tensor empty_result(const QkvCall& call) {
  const std::int64_t heads =
      call.num_heads + (call.pages.keys.has_value() ? 0 : 2 * call.num_kv_heads);
  return at::empty_symint({call.linear.input.sym_size(0), heads * call.head_dim},
                          call.linear.input.options());
}

Tensor run(const QkvCall& call) {
  Tensor output = empty_result(call);
  run_on(
      kName, call.linear.input.device(), [] {},
      [&](auto stream) {
        run_on_gpu(call.linear,
                   {.output = output.mutable_data_ptr(),
                    .output_stride = output.size(1),
                    .qkv = {.head_dim = static_cast<std::int32_t>(call.head_dim),
                            .num_heads = static_cast<std::int32_t>(call.num_heads),
                            .num_kv_heads = static_cast<std::int32_t>(call.num_kv_heads),
                            .rotary = describe(call.rotation),
                            .pages = describe(call.pages),
                            .cache_rows = data_or_null<std::int32_t>(call.cache_rows)}},
                   stream);
      });
  return output;
}

using QkvLinear = Described<&describe_call, &run, &empty_result>;

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, QkvLinear::on_device);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, QkvLinear::on_device);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, QkvLinear::on_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(moq, ADInplaceOrView, m) {
  m.impl(kName, torch::CppFunction::makeFromBoxedFunction<bump_versions>());
}

}  // namespace moq::ops
