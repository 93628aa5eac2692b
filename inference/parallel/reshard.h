#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "inference/parallel/sharding.h"

/// Which rows of a stored projection a rank needs: index maps, the same for codes and for scales.
namespace moq::inference {

/// Where query, key and value rows lie in a fused projection. In a weight stored [in, out] (GPT-2's
/// Conv1D) the same order runs along the columns.
enum class QkvOrder {
  kConcatenated,  ///< all query rows, all key rows, all value rows: GPT-2, Megatron-LM checkpoint
                  ///< version 0
  kElementwise,   ///< [num_heads, head_dim, 3]: Megatron-LM checkpoint version 1.0; no grouped
                  ///< queries
  kPerGroup       ///< [num_kv_heads, queries of the group, key, value, head_dim]: Megatron-LM
                  ///< version 2.0 on, NeoX
};

/// QkvOrder from its name in a policy: "concatenated", "elementwise", "per_group".
/// @throws moq::Error for another name; `where` begins the message.
QkvOrder parse_qkv_order(const std::string& name, const std::string& where);

/// The sizes of an attention layer.
struct QkvShape {
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;

  /// Rows of the fused projection.
  std::int64_t rows() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

/// For each row of a shard's q | k | v (concatenated, heads in order) the row of the fused
/// projection that holds it. Over the shards of all ranks every fused row occurs; a key or value
/// row once per rank that keeps a copy.
/// @throws moq::Error if the shard lies outside the shape, or for kElementwise if num_kv_heads !=
/// num_heads.
std::vector<std::int64_t> qkv_rows(QkvOrder order, const QkvShape& shape, const HeadShard& shard);

/// The indices as ranges of consecutive numbers, in order: what can be read in one go.
std::vector<Range> runs_of(std::span<const std::int64_t> indices);

}  // namespace moq::inference
