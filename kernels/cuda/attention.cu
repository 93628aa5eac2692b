// Attention on a GPU: checks, and the choice of a kernel.
#include <cuda_runtime.h>

#include <limits>

#include "kernels/common/check.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/attention_kernels.h"

namespace moq::kernels::cuda {
namespace {

void check(const DeviceAttentionArgs& args) {
  MOQ_CHECK(is_float(args.dtype), "attention: dtype must be float16, bfloat16 or float32, got ",
            name_of(args.dtype));
  MOQ_CHECK(args.num_sequences >= 0 && args.max_tokens >= 0,
            "attention: num_sequences and max_tokens must be >= 0, got ", args.num_sequences,
            " and ", args.max_tokens);
  MOQ_CHECK(
      args.num_heads >= 1 && args.num_kv_heads >= 1 && args.num_heads % args.num_kv_heads == 0,
      "attention: num_heads must be a multiple of num_kv_heads, got ", args.num_heads, " and ",
      args.num_kv_heads);
  MOQ_CHECK(args.head_dim >= 1 && args.head_dim <= kMaxHeadDim,
            "attention: head_dim must be in [1, ", kMaxHeadDim, "], got ", args.head_dim);
  MOQ_CHECK(args.scale > 0.0F, "attention: scale must be > 0, got ", args.scale);
  if (args.num_sequences == 0 || args.max_tokens == 0) {
    return;
  }
  MOQ_CHECK(args.num_sequences <=
                std::numeric_limits<std::int32_t>::max() / args.max_tokens / args.num_heads,
            "attention: num_sequences * max_tokens * num_heads must be below 2^31, got ",
            args.num_sequences, ", ", args.max_tokens, " and ", args.num_heads);
  MOQ_CHECK(args.query != nullptr, "attention: query must not be null");
  MOQ_CHECK(args.output != nullptr, "attention: output must not be null");
  MOQ_CHECK(args.sequences != nullptr, "attention: sequences must not be null");
  const std::int64_t width = args.num_heads * args.head_dim;
  MOQ_CHECK(args.query_stride >= width && args.output_stride >= width,
            "attention: query_stride and output_stride must be >= ", width, ", got ",
            args.query_stride, " and ", args.output_stride);
  check_pages(args.pages, args.dtype, "attention");
  if (args.pages.keys != nullptr) {
    MOQ_CHECK(args.page_table != nullptr, "attention: pages need a page_table");
    return;
  }
  MOQ_CHECK(args.packed_keys != nullptr && args.packed_values != nullptr,
            "attention: packed_keys and packed_values must not be null without pages");
  MOQ_CHECK(args.packed_stride >= args.num_kv_heads * args.head_dim,
            "attention: packed_stride must be >= ", args.num_kv_heads * args.head_dim, ", got ",
            args.packed_stride);
}

}  // namespace

bool suits_tensor_cores(const DeviceAttentionArgs& args) {
  constexpr int kPiece = 16;
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % kPiece == 0;
  };
  const auto whole = [](std::int64_t elements, DType dtype) {
    return elements * static_cast<std::int64_t>(size_of(dtype)) % kPiece == 0;
  };
  if (args.dtype == DType::kFloat32 || !whole(args.head_dim, args.dtype) ||
      !whole(args.query_stride, args.dtype) || !whole(args.output_stride, args.dtype) ||
      !aligned(args.query) || !aligned(args.output)) {
    return false;
  }
  return args.pages.keys != nullptr ? whole(args.head_dim, args.pages.dtype) &&
                                          aligned(args.pages.keys) && aligned(args.pages.values)
                                    : whole(args.packed_stride, args.dtype) &&
                                          aligned(args.packed_keys) && aligned(args.packed_values);
}

void attention(const DeviceAttentionArgs& args, cudaStream_t stream) {
  check(args);
  if (args.num_sequences == 0 || args.max_tokens == 0) {
    return;
  }
  if (can_split(args)) {
    return split_attention(args, stream);
  }
  if (prefers_wide(args) && can_wide(args)) {
    return wide_attention(args, stream);
  }
  if (can_flash(args)) {
    return flash_attention(args, stream);
  }
  plain_attention(args, stream);
}

}  // namespace moq::kernels::cuda
