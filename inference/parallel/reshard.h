#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "inference/parallel/sharding.h"

/// Taking a stored weight apart into shards and putting it together again: index maps, and two
/// functions that move bytes along them. A quantized weight is resharded by applying one map to its
/// codes and to its scales. Splitting and then merging is the identity on the bytes, for every
/// degree.
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

/// The indices begin, begin + 1, …, end - 1: the map of a plain range.
std::vector<std::int64_t> indices_of(Range range);

/// The indices as ranges of consecutive numbers, in order: what can be read in one go.
std::vector<Range> runs_of(std::span<const std::int64_t> indices);

/// Scales of a column shard of a weight that has one scale per `group_size` columns.
struct ColumnGroups {
  std::int64_t group_size = 0;  ///< columns per scale in the shard
  std::vector<std::int64_t>
      scale_columns;  ///< [columns / group_size], scale column of the whole weight
};

/// Groups of `columns`. A cut inside a group gives both neighbours that group's scale, and the
/// shard smaller groups: the largest size that divides group_size and both ends of the range.
/// @throws moq::Error if group_size < 1 or the range is not one of non-negative numbers.
ColumnGroups shard_groups(Range columns, std::int64_t group_size);

/// A tensor as [outer, count, inner_bytes], seen from the axis that is cut. For the rows of a
/// row-major matrix: {1, rows, bytes of a row}; for its columns: {rows, columns, bytes of an
/// element}.
struct AxisView {
  std::int64_t outer = 1;
  std::int64_t count = 0;
  std::int64_t inner_bytes = 0;
};

/// part[o, i, :] = whole[o, indices[i], :].
/// @param whole  [outer, count, inner_bytes]
/// @param part   [outer, indices.size(), inner_bytes], written; must not overlap `whole`
/// @throws moq::Error if a span's size is not what the view says or an index is outside [0, count).
void gather(std::span<const std::byte> whole, const AxisView& view,
            std::span<const std::int64_t> indices, std::span<std::byte> part);

/// whole[o, indices[i], :] = part[o, i, :]; what no index names is left as it is. The inverse of
/// gather().
/// @throws moq::Error as gather().
void scatter(std::span<const std::byte> part, const AxisView& view,
             std::span<const std::int64_t> indices, std::span<std::byte> whole);

}  // namespace moq::inference
