#pragma once

#include <cstdint>

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

}  // namespace moq::kernels
