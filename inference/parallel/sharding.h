#pragma once

#include <cstdint>

/// How tensor parallelism cuts a transformer: pure functions of sizes and a rank, no torch, no
/// communication. Every degree up to the number of attention heads works, whether it divides
/// anything or not.
namespace moq::inference {

/// The half-open range [begin, end) of rows, columns or heads.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  std::int64_t size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

/// The attention heads of one rank.
///
/// Query heads are grouped as in grouped-query attention: the query heads of KV head g are
/// [g * group, (g + 1) * group) with group = num_heads / num_kv_heads. `query_heads` is either all
/// groups of `kv_heads`, or a part of the one group of the single head in `kv_heads`. Therefore
/// query_heads.size() % kv_heads.size() == 0, and an attention kernel runs on a shard as on a whole
/// layer.
struct HeadShard {
  Range query_heads;
  Range kv_heads;

  bool operator==(const HeadShard&) const = default;
};

/// The heads of `rank` among `size` ranks.
///
/// With size <= num_kv_heads the KV heads are dealt as evenly as whole heads allow, earlier ranks
/// taking one more, each with all of its query heads. With more ranks than KV heads, the ranks are
/// dealt to the KV heads in the same way, each of them keeps a copy of its KV head, and the ranks
/// of one KV head share its query heads. The query heads of all ranks cover [0, num_heads) once, in
/// rank order, and no rank is without one.
/// @throws moq::Error if num_kv_heads does not divide num_heads, rank is outside [0, size), or size
/// exceeds num_heads;
///     the message names num_heads as the largest size that works.
HeadShard shard_heads(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t rank,
                      std::int64_t size);

/// The part of [0, total) that `rank` among `size` ranks holds: feed-forward columns, vocabulary
/// rows.
///
/// Cuts only at multiples of `alignment`; the aligned blocks (the last one may be short) are dealt
/// as evenly as whole blocks allow, earlier ranks taking one more. With fewer blocks than ranks the
/// last ranks get an empty range.
/// @throws moq::Error if total < 0, alignment < 1, or rank is outside [0, size).
Range shard_range(std::int64_t total, std::int64_t alignment, std::int64_t rank, std::int64_t size);

}  // namespace moq::inference
