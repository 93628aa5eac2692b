#include "inference/parallel/sharding.h"

#include <algorithm>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

void check_rank(const char* where, std::int64_t rank, std::int64_t size) {
  MOQ_CHECK(rank >= 0 && rank < size, where, ": rank must be in [0, size), got rank ", rank,
            " of size ", size);
}

/// Deals `count` items to `size` takers in order, as evenly as possible, earlier ones first.
Range deal(std::int64_t count, std::int64_t taker, std::int64_t size) {
  const std::int64_t each = count / size;
  const std::int64_t larger = count % size;
  const std::int64_t begin = taker * each + std::min(taker, larger);
  return {begin, begin + each + (taker < larger ? 1 : 0)};
}

/// The taker whose share of deal(count, ·, size) holds `item`; count >= size.
std::int64_t holder(std::int64_t item, std::int64_t count, std::int64_t size) {
  const std::int64_t each = count / size;
  const std::int64_t in_larger = (count % size) * (each + 1);
  return item < in_larger ? item / (each + 1) : count % size + (item - in_larger) / each;
}

}  // namespace

HeadShard shard_heads(std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t rank,
                      std::int64_t size) {
  MOQ_CHECK(num_kv_heads >= 1 && num_heads >= 1 && num_heads % num_kv_heads == 0,
            "shard_heads: num_kv_heads must divide num_heads, got ", num_kv_heads, " and ",
            num_heads);
  check_rank("shard_heads", rank, size);
  MOQ_CHECK(size <= num_heads, "shard_heads: the tensor-parallel degree must be at most the number",
            " of attention heads, got ", size, " ranks for ", num_heads,
            " heads; the largest degree that works is ", num_heads);
  const std::int64_t group = num_heads / num_kv_heads;
  if (size <= num_kv_heads) {
    const Range kv_heads = deal(num_kv_heads, rank, size);
    return {{kv_heads.begin * group, kv_heads.end * group}, kv_heads};
  }
  const std::int64_t kv_head = holder(rank, size, num_kv_heads);
  const Range sharers = deal(size, kv_head, num_kv_heads);
  const Range part = deal(group, rank - sharers.begin, sharers.size());
  return {{kv_head * group + part.begin, kv_head * group + part.end}, {kv_head, kv_head + 1}};
}

Range shard_range(std::int64_t total, std::int64_t alignment, std::int64_t rank,
                  std::int64_t size) {
  MOQ_CHECK(total >= 0 && alignment >= 1,
            "shard_range: total must be >= 0 and alignment >= 1, got ", total, " and ", alignment);
  check_rank("shard_range", rank, size);
  const Range blocks = deal((total + alignment - 1) / alignment, rank, size);
  return {std::min(blocks.begin * alignment, total), std::min(blocks.end * alignment, total)};
}

}  // namespace moq::inference
