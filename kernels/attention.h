#pragma once

#include <cstdint>

#include "kernels/common/dtype.h"
#include "kernels/norm.h"

struct CUstream_st;

namespace moq::kernels {

/// One sequence of a ragged batch whose tokens are packed: no padding is stored or computed.
struct AttentionSequence {
  std::int64_t token_begin;  ///< row of its first new token among the packed tokens
  std::int64_t num_tokens;   ///< new tokens, >= 0: one while decoding, a prompt's length in prefill
  std::int64_t slot;         ///< where its keys and values lie, in units of slot_stride
  std::int64_t past_length;  ///< keys before the first new token
};

/// Copies the keys and values of new tokens behind those of their sequence:
///
///   key_cache[slot, head, past_length + i, :] = keys[token_begin + i, head, :],  and so for values
///
/// A cache is [num_slots, num_kv_heads, capacity, head_dim], contiguous, float32.
struct AppendKvArgs {
  const float* keys;          ///< [num_tokens, num_kv_heads, head_dim], rows token_stride apart
  const float* values;        ///< the same
  std::int64_t token_stride;  ///< elements; in a packed [q | k | v] row the row's width
  const AttentionSequence* sequences;  ///< [num_sequences]
  std::int64_t num_sequences;          ///< >= 0
  std::int64_t num_kv_heads;           ///< >= 1
  std::int64_t head_dim;               ///< >= 1
  float* key_cache;
  float* value_cache;
  std::int64_t num_slots;
  std::int64_t capacity;  ///< positions per slot
};

/// Scaled dot-product attention of the new tokens of a ragged batch over their sequences' keys, the
/// new tokens' own keys included. New token i of a sequence stands at position p = past_length + i.
/// Query head h belongs to kv head g = h / group, with group = num_heads / num_kv_heads:
///
///   score[j]     = scale * dot(query[i, h], key[j, g]) - alibi_slopes[h] * |p - j|
///   output[i, h] = sum_j softmax(score)[j] * value[j, g]
///
/// where j runs over the past_length + num_tokens keys of the sequence, up to p if causal.
///
/// Element d of key j of kv head g lies at
///   keys[slot * slot_stride + g * kv_head_stride + j * key_stride + d],  and so for values,
/// which describes both
///   a cache of append_kv    slot_stride = num_kv_heads * capacity * head_dim,
///                           kv_head_stride = capacity * head_dim, key_stride = head_dim
///   packed [q | k | v] rows slot_stride = key_stride = the row's width, kv_head_stride = head_dim,
///                           slot = token_begin, past_length = 0 (encoders: no cache needed)
///
/// float32 with float32 accumulation, streaming softmax (no score matrix is stored). The order of a
/// row's sums depends on its head_dim and the number of its keys alone: a causal token gets the
/// same bits alone and in any batch, decoded or in a prompt cut in any way, with any number of
/// threads.
///
/// Sources: Milakov & Gimelshein 2018 (online softmax), Dao et al. 2022 (tiling), Dao et al. 2023
/// (spans of keys), Press et al. 2022 (ALiBi).
struct AttentionArgs {
  const float* query;         ///< [num_tokens, num_heads, head_dim], rows query_stride apart
  std::int64_t query_stride;  ///< elements
  const float* keys;
  const float* values;
  std::int64_t slot_stride;            ///< elements
  std::int64_t kv_head_stride;         ///< elements
  std::int64_t key_stride;             ///< elements
  const AttentionSequence* sequences;  ///< [num_sequences]
  std::int64_t num_sequences;          ///< >= 0
  std::int64_t num_heads;              ///< a multiple of num_kv_heads
  std::int64_t num_kv_heads;           ///< >= 1
  std::int64_t head_dim;               ///< >= 1
  bool causal;
  float scale;                          ///< 1 / sqrt(head_dim) in most models
  const float* alibi_slopes = nullptr;  ///< [num_heads], > 0; null: no position bias
  float* output;               ///< [num_tokens, num_heads, head_dim], rows output_stride apart
  std::int64_t output_stride;  ///< elements
};

namespace cpu {
/// @throws moq::Error if a size is out of range, or the slot or the length of a sequence does not
///         fit into the cache; nothing has been copied then.
void append_kv(const AppendKvArgs& args);
/// @throws moq::Error if a size is out of range.
void attention(const AttentionArgs& args);
}  // namespace cpu

// ---- on a GPU; all pointers are device memory

/// Tokens of a page of a KV cache.
constexpr std::int64_t kPageTokens = 64;

/// Keys and values of one layer, in pages that any sequence may own. With r the row of a token in
/// the cache, page * kPageTokens + token of the page, element d of its key for kv head g is
///   keys[((r / kPageTokens * num_kv_heads + g) * kPageTokens + r % kPageTokens) * head_dim + d].
struct DevicePages {
  void* keys = nullptr;    ///< [pages, num_kv_heads, kPageTokens, head_dim], dtype; null: no cache
  void* values = nullptr;  ///< the same
  /// [pages, num_kv_heads, kPageTokens]: step sizes of a kInt8 cache (symmetric codes, one grid a
  /// token and head), else null.
  float* key_scales = nullptr;
  float* value_scales = nullptr;
  DType dtype = DType::kFloat16;  ///< that of the activations, or kInt8
};

/// The rotation of `rotary`: positions look up cosines and sines.
struct DeviceRotary {
  std::int32_t rotary_dim = 0;              ///< 0: no rotation
  const std::int32_t* positions = nullptr;  ///< [num_tokens]
  const float* cos = nullptr;               ///< [positions, rotary_dim / 2]
  const float* sin = nullptr;               ///< the same
};

/// What stands between the QKV projection and attention where the projection's kernel did not do it
/// already (DeviceQkvOutput): normalises each head of q and k (qk_norm), rotates them, in place,
/// and appends k and v to the cache, rounded to 8 bits if it holds INT8.
struct DeviceAppendKvArgs {
  void* qkv = nullptr;            ///< [num_tokens, q | k | v], dtype, rows token_stride apart
  std::int64_t token_stride = 0;  ///< elements
  std::int64_t num_tokens = 0;    ///< >= 0
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  ///< in [1, cuda::kMaxHeadDim]
  DeviceNorm query_norm{};    ///< over head_dim
  DeviceNorm key_norm{};
  DeviceRotary rotary{};
  DevicePages pages{};                       ///< null keys: nothing is appended
  const std::int32_t* cache_rows = nullptr;  ///< [num_tokens]; < 0: the token is not appended
  DType dtype = DType::kFloat16;             ///< of qkv
};

/// One sequence of a ragged batch.
struct DeviceSequence {
  std::int32_t token_begin;  ///< row of its first new token among the packed tokens
  std::int32_t num_tokens;   ///< new tokens, >= 0
  std::int32_t past_length;  ///< keys before the first new token
  std::int32_t slot;         ///< row of the page table
};

/// `attention` on a GPU: keys and values of a sequence lie in the pages that its row of the page
/// table names, those of its new tokens included; or, where there is no cache, in the packed rows
/// of its new tokens. Products of 16-bit numbers are exact, softmax and sums are float32 (the
/// probabilities that multiply the values are rounded to dtype, as in other implementations).
///
/// While decoding (max_tokens 1) the keys of a sequence are shared by a cluster of thread blocks;
/// nothing but device memory tells how many there are, so that a captured launch serves any length.
struct DeviceAttentionArgs {
  const void* query = nullptr;    ///< [num_tokens, num_heads, head_dim], rows query_stride apart
  std::int64_t query_stride = 0;  ///< elements
  DevicePages pages{};            ///< keys null: packed rows
  const std::int32_t* page_table = nullptr;  ///< [slots, page_table_stride]
  std::int64_t page_table_stride = 0;
  const void* packed_keys = nullptr;  ///< [num_tokens, num_kv_heads, head_dim], rows packed_stride
  const void* packed_values = nullptr;  ///< apart; the same
  std::int64_t packed_stride = 0;
  const DeviceSequence* sequences = nullptr;  ///< [num_sequences]
  std::int64_t num_sequences = 0;             ///< >= 0
  std::int64_t max_tokens = 0;                ///< no sequence has more new tokens
  std::int64_t num_heads = 0;                 ///< a multiple of num_kv_heads
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;  ///< in [1, cuda::kMaxHeadDim]
  bool causal = true;
  float scale = 1.0F;                   ///< > 0
  const float* alibi_slopes = nullptr;  ///< [num_heads]; null: no position bias
  void* output = nullptr;  ///< [num_tokens, num_heads, head_dim], dtype, rows output_stride apart
  std::int64_t output_stride = 0;
  DType dtype = DType::kFloat16;  ///< of query, packed rows and output
  /// Reads sequences, page_table, and keys and values of past tokens before the kernels ahead in
  /// the stream have ended. Only if none of those that may still run writes them: the step before
  /// wrote them, and this one began when that had ended (a graph's launch does), or kernels ahead
  /// of one that lets others begin only when these have ended (`embedding`).
  bool past_is_ready = false;
};

namespace cuda {
constexpr int kMaxHeadDim = 256;

/// @throws moq::Error if a size or dtype is out of range, a pointer is missing, or the launch
/// fails.
void append_kv(const DeviceAppendKvArgs& args, CUstream_st* stream);
/// @throws moq::Error as append_kv.
void attention(const DeviceAttentionArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
