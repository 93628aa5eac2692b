#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels/attention.h"

/// The pages of a KV cache and the rotation of heads, as the operators of attention take them.
namespace moq::ops {

/// @throws NotImplementedError (Python's) naming `where`: there is no cache in pages on the CPU.
void refuse_cpu_pages(const char* where, const at::Tensor& tensor);

/// Head size of packed rows [num_tokens, q | k | v].
/// @throws ValueError (Python's) naming `where`, unless the heads divide the row.
std::int64_t head_dim_of(const char* where, const at::Tensor& qkv, std::int64_t num_heads,
                         std::int64_t num_kv_heads);

/// @throws ValueError (Python's) naming `where`, unless the pages have four dimensions.
std::int64_t kv_heads_of(const char* where, const at::Tensor& key_pages);

/// Keys and values of one layer, in pages of kernels::kPageTokens tokens.
struct KvPages {
  std::optional<at::Tensor> keys;    ///< [pages, num_kv_heads, 64, head_dim]
  std::optional<at::Tensor> values;  ///< the same
  std::optional<at::Tensor> key_scales =
      std::nullopt;  ///< [pages, num_kv_heads, 64], of INT8 pages
  std::optional<at::Tensor> value_scales = std::nullopt;
};

/// @throws ValueError or TypeError (Python's) naming `where`, unless all pages have the type of
///         the activations `like`, or are int8 with scales, and lie on its device.
void check(const char* where, const KvPages& pages, const at::Tensor& like,
           std::int64_t num_kv_heads, std::int64_t head_dim);

/// Positions of tokens and the cosines and sines that they look up.
struct Rotation {
  std::optional<at::Tensor> positions;  ///< [num_tokens] int32; none: no rotation
  std::optional<at::Tensor> cos;        ///< [positions, rotary_dim / 2] float32
  std::optional<at::Tensor> sin;
};

/// @throws ValueError or TypeError (Python's) naming `where`, unless all three are given for the
///         tokens of `like`, or none.
void check(const char* where, const Rotation& rotation, const at::Tensor& like,
           std::int64_t head_dim);

/// As the kernels take them.
kernels::DevicePages describe(const KvPages& pages);
kernels::DeviceRotary describe(const Rotation& rotation);

}  // namespace moq::ops
