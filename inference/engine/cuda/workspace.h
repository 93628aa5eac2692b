#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "inference/engine/cuda/device_memory.h"
#include "kernels/common/integer_math.h"

namespace moq::inference::cuda {

/// Sizes of a rank's activations, in elements of a token.
struct ActivationSizes {
  std::int64_t hidden;
  std::int64_t qkv;    ///< q | k | v
  std::int64_t query;  ///< heads * head_dim
  std::int64_t inner;  ///< columns of the feed-forward block
  std::int64_t element_bytes;
};

/// Activations of up to `max_tokens` tokens in one allocation, planned at once; rows are tokens.
struct Workspace {
  std::int64_t max_tokens = 0;
  at::Tensor memory;
  void* x = nullptr;             ///< [hidden], the residual stream
  void* normed = nullptr;        ///< [hidden], where a norm is a kernel of its own
  void* qkv = nullptr;           ///< [q | k | v], or [q]
  void* attended = nullptr;      ///< [query]
  void* inner = nullptr;         ///< [inner]
  void* codes = nullptr;         ///< the widest input of a projection, rounded to 8 bits
  float* row_scales = nullptr;   ///< [1], their step sizes
  float* row_extents = nullptr;  ///< [2], what these are made for where ranks share a row

  std::int64_t bytes() const { return memory.defined() ? memory.numel() : 0; }

  /// Of an empty one.
  /// @throws OutOfMemory, leaving it empty
  void plan(std::int64_t num_tokens, const ActivationSizes& sizes) {
    constexpr std::int64_t kAlignment = 256;
    std::int64_t end = 0;
    const auto place = [&](std::int64_t row_bytes) {
      const std::int64_t begin = end;
      end += round_up(num_tokens * row_bytes, kAlignment);
      return begin;
    };
    const std::int64_t element = sizes.element_bytes;
    const std::int64_t widest = std::max({sizes.hidden, sizes.query, sizes.inner});
    const std::int64_t begins[] = {place(sizes.hidden * element), place(sizes.hidden * element),
                                   place(sizes.qkv * element),    place(sizes.query * element),
                                   place(sizes.inner * element),  place(widest * element),
                                   place(3 * sizeof(float))};
    memory = allocate(end, "the workspace",
                      would_fit("tokens at once", num_tokens, divide_up(end, num_tokens)));
    max_tokens = num_tokens;
    auto* const base = static_cast<char*>(memory.mutable_data_ptr());
    void** const parts[] = {&x, &normed, &qkv, &attended, &inner, &codes};
    for (std::size_t i = 0; i < std::size(parts); ++i) {
      *parts[i] = base + begins[i];
    }
    row_scales = reinterpret_cast<float*>(base + begins[std::size(parts)]);
    row_extents = row_scales + num_tokens;
  }
};

}  // namespace moq::inference::cuda
