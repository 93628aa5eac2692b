#pragma once

#include <cstdint>

#include "kernels/attention.h"

/// What attention.cu chooses from.
namespace moq::kernels::cuda {

/// @throws moq::Error if pages (where there are any) have another dtype than activations of `dtype`
///         can use, or lack a pointer.
void check_pages(const DevicePages& pages, DType dtype, const char* op);

/// Whether tensor cores multiply queries and keys where they lie: 16-bit activations, and rows that
/// consist of whole pieces of 16 bytes.
bool suits_tensor_cores(const DeviceAttentionArgs& args);

/// Blocks that take so many rows each, (token, head) pairs of a kv head, for the longest sequence.
inline std::int64_t row_blocks_of(const DeviceAttentionArgs& args, std::int64_t rows) {
  return (args.max_tokens * (args.num_heads / args.num_kv_heads) + rows - 1) / rows;
}

/// Few queries for many keys: keys are shared by warps, and by blocks of a cluster.
bool can_split(const DeviceAttentionArgs& args);
void split_attention(const DeviceAttentionArgs& args, CUstream_st* stream);

/// Many queries: they are shared by warps and blocks.
bool can_flash(const DeviceAttentionArgs& args);
void flash_attention(const DeviceAttentionArgs& args, CUstream_st* stream);

/// The same with 16-bit keys on compute capability 9.0 (sm_90a).
bool can_wide(const DeviceAttentionArgs& args);
/// Whether it takes less time than flash_attention.
bool prefers_wide(const DeviceAttentionArgs& args);
void wide_attention(const DeviceAttentionArgs& args, CUstream_st* stream);

/// Everything, slowly.
void plain_attention(const DeviceAttentionArgs& args, CUstream_st* stream);

}  // namespace moq::kernels::cuda
