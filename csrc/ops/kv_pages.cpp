#include "csrc/ops/kv_pages.h"

#include "csrc/ops/checks.h"
#include "csrc/ops/quantizer.h"

namespace moq::ops {

using at::Tensor;

void refuse_cpu_pages(const char* where, const Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !tensor.is_cpu(), where,
      ": tensors must be on a CUDA device, got cpu; pages are a GPU's cache");
}

std::int64_t head_dim_of(const char* where, const Tensor& qkv, std::int64_t num_heads,
                         std::int64_t num_kv_heads) {
  TORCH_CHECK_VALUE(num_kv_heads > 0 && num_heads > 0, where,
                    ": num_heads and num_kv_heads must be positive, got ", num_heads, " and ",
                    num_kv_heads);
  TORCH_CHECK_VALUE(qkv.dim() == 2, where, ": qkv must be [num_tokens, q | k | v], got ", qkv.dim(),
                    " dimensions");
  const std::int64_t width = known_size(qkv, 1);
  const std::int64_t heads = num_heads + 2 * num_kv_heads;
  TORCH_CHECK_VALUE(width > 0 && width % heads == 0, where, ": qkv must have the columns of ",
                    heads, " heads, got ", width);
  return width / heads;
}

std::int64_t kv_heads_of(const char* where, const Tensor& key_pages) {
  TORCH_CHECK_VALUE(key_pages.dim() == 4, where, ": key_pages must be [pages, num_kv_heads, ",
                    kernels::kPageTokens, ", head_dim], got ", key_pages.dim(), " dimensions");
  return known_size(key_pages, 1);
}

void check(const char* where, const KvPages& pages, const Tensor& like, std::int64_t num_kv_heads,
           std::int64_t head_dim) {
  TORCH_CHECK_VALUE(pages.keys.has_value() == pages.values.has_value(), where,
                    ": key_pages and value_pages must come together, got one of them");
  if (!pages.keys.has_value()) {
    return;
  }
  const at::ScalarType type = pages.keys->scalar_type();
  TORCH_CHECK_TYPE(type == like.scalar_type() || type == at::kChar, where,
                   ": key_pages must be int8 or as the activations ", name_of(like.scalar_type()),
                   ", got ", name_of(type));
  kv_heads_of(where, *pages.keys);
  const SymSizes<4> sizes{pages.keys->sym_size(0), num_kv_heads, kernels::kPageTokens, head_dim};
  const SymSizes<3> scale_sizes{sizes[0], sizes[1], sizes[2]};
  check_tensor(where, "key_pages", pages.keys, type, like.device(), sizes);
  check_tensor(where, "value_pages", pages.values, type, like.device(), sizes);
  const bool scaled = type == at::kChar;
  TORCH_CHECK_VALUE(
      pages.key_scales.has_value() == scaled && pages.value_scales.has_value() == scaled, where,
      ": key_scales and value_scales must come with int8 pages and no others, got ", name_of(type),
      " pages with ", pages.key_scales.has_value() + pages.value_scales.has_value(), " of them");
  check_tensor(where, "key_scales", pages.key_scales, at::kFloat, like.device(), scale_sizes);
  check_tensor(where, "value_scales", pages.value_scales, at::kFloat, like.device(), scale_sizes);
  for (const auto& [what, tensor] :
       {std::pair("key_pages", &pages.keys), std::pair("value_pages", &pages.values),
        std::pair("key_scales", &pages.key_scales),
        std::pair("value_scales", &pages.value_scales)}) {
    if (tensor->has_value()) {
      check_contiguous(where, what, **tensor);
    }
  }
}

void check(const char* where, const Rotation& rotation, const Tensor& like, std::int64_t head_dim) {
  const bool rotates = rotation.positions.has_value();
  TORCH_CHECK_VALUE(rotation.cos.has_value() == rotates && rotation.sin.has_value() == rotates,
                    where, ": positions, cos and sin must come together, got some of them");
  if (!rotates) {
    return;
  }
  check_tensor(where, "positions", rotation.positions, at::kInt, like.device(),
               SymSizes<1>{like.sym_size(0)});
  const Tensor& cos = *rotation.cos;
  TORCH_CHECK_VALUE(cos.dim() == 2 && cos.sym_size(1) > 0 && 2 * cos.sym_size(1) <= head_dim, where,
                    ": cos must be [positions, rotary_dim / 2] with rotary_dim <= ", head_dim,
                    ", got ", cos.sym_sizes());
  check_tensor(where, "cos", cos, at::kFloat, like.device(), cos.sym_sizes());
  check_tensor(where, "sin", *rotation.sin, at::kFloat, like.device(), cos.sym_sizes());
  check_contiguous(where, "positions", *rotation.positions);
  check_contiguous(where, "cos", cos);
  check_contiguous(where, "sin", *rotation.sin);
}

kernels::DevicePages describe(const KvPages& pages) {
  if (!pages.keys.has_value()) {
    return {};
  }
  const auto scales = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? tensor->mutable_data_ptr<float>() : nullptr;
  };
  return {.keys = pages.keys->mutable_data_ptr(),
          .values = pages.values->mutable_data_ptr(),
          .key_scales = scales(pages.key_scales),
          .value_scales = scales(pages.value_scales),
          .dtype = dtype_of(pages.keys->scalar_type())};
}

kernels::DeviceRotary describe(const Rotation& rotation) {
  if (!rotation.positions.has_value()) {
    return {};
  }
  return {.rotary_dim = static_cast<std::int32_t>(2 * rotation.cos->size(1)),
          .positions = rotation.positions->const_data_ptr<std::int32_t>(),
          .cos = rotation.cos->const_data_ptr<float>(),
          .sin = rotation.sin->const_data_ptr<float>()};
}

}  // namespace moq::ops
