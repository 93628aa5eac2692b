// moq::append_kv: what stands between the projection of queries, keys and values and attention over
// a cache, where moq::qkv_linear has not done it already.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/in_place.h"
#include "csrc/ops/kv_pages.h"
#include "csrc/ops/quantizer.h"
#include "kernels/attention.h"

namespace moq::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "append_kv";

struct AppendCall {
  Tensor qkv;
  std::int64_t num_heads;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
  KvPages pages;
  Tensor cache_rows;
  OptionalTensor query_norm;
  OptionalTensor key_norm;
  double epsilon;
  Rotation rotation;
};

AppendCall describe_call(const Tensor& qkv, const Tensor& key_pages, const Tensor& value_pages,
                         const Tensor& cache_rows, std::int64_t num_heads,
                         const OptionalTensor& key_scales, const OptionalTensor& value_scales,
                         const OptionalTensor& query_norm, const OptionalTensor& key_norm,
                         double epsilon, const OptionalTensor& positions, const OptionalTensor& cos,
                         const OptionalTensor& sin) {
  refuse_cpu_pages(kName, qkv);
  check_activations(kName, "qkv", qkv);
  const std::int64_t num_kv_heads = kv_heads_of(kName, key_pages);
  const std::int64_t head_dim = head_dim_of(kName, qkv, num_heads, num_kv_heads);
  AppendCall call{.qkv = qkv,
                  .num_heads = num_heads,
                  .num_kv_heads = num_kv_heads,
                  .head_dim = head_dim,
                  .pages = {.keys = key_pages,
                            .values = value_pages,
                            .key_scales = key_scales,
                            .value_scales = value_scales},
                  .cache_rows = cache_rows,
                  .query_norm = query_norm,
                  .key_norm = key_norm,
                  .epsilon = epsilon,
                  .rotation = {.positions = positions, .cos = cos, .sin = sin}};
  const at::Device device = qkv.device();
  check_contiguous(kName, "qkv", qkv);
  check(kName, call.pages, qkv, num_kv_heads, head_dim);
  check(kName, call.rotation, qkv, head_dim);
  check_tensor(kName, "cache_rows", cache_rows, at::kInt, device, SymSizes<1>{qkv.sym_size(0)});
  check_contiguous(kName, "cache_rows", cache_rows);
  check_tensor(kName, "query_norm", query_norm, at::kFloat, device, SymSizes<1>{head_dim});
  check_tensor(kName, "key_norm", key_norm, at::kFloat, device, SymSizes<1>{head_dim});
  return call;
}

void run(const AppendCall& call) {
  run_on(
      kName, call.qkv.device(), [] {},
      [&](auto stream) {
        const OptionalTensor query_weight = contiguous(call.query_norm);
        const OptionalTensor key_weight = contiguous(call.key_norm);
        const auto norm = [&](const OptionalTensor& weight) {
          return kernels::DeviceNorm{
              .kind = weight.has_value() ? kernels::NormKind::kRmsNorm : kernels::NormKind::kNone,
              .weight = data_or_null<float>(weight),
              .epsilon = static_cast<float>(call.epsilon)};
        };
        kernels::cuda::append_kv({.qkv = call.qkv.mutable_data_ptr(),
                                  .token_stride = call.qkv.size(1),
                                  .num_tokens = call.qkv.size(0),
                                  .num_heads = call.num_heads,
                                  .num_kv_heads = call.num_kv_heads,
                                  .head_dim = call.head_dim,
                                  .query_norm = norm(query_weight),
                                  .key_norm = norm(key_weight),
                                  .rotary = describe(call.rotation),
                                  .pages = describe(call.pages),
                                  .cache_rows = call.cache_rows.const_data_ptr<std::int32_t>(),
                                  .dtype = dtype_of(call.qkv.scalar_type())},
                                 stream);
      });
}

void nothing(const AppendCall& /*call*/) {}

using AppendKv = Described<&describe_call, &run, &nothing>;

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, AppendKv::on_device);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, AppendKv::on_device);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, AppendKv::on_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(moq, ADInplaceOrView, m) {
  m.impl(kName, torch::CppFunction::makeFromBoxedFunction<bump_versions>());
}

}  // namespace moq::ops
