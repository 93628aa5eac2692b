#include "inference/parallel/reshard.h"

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

enum Part : std::int64_t { kQuery, kKey, kValue };

/// Row of the fused projection that holds element `d` of `head` (a query head, or a KV head).
std::int64_t fused_row(QkvOrder order, const QkvShape& shape, Part part, std::int64_t head,
                       std::int64_t d) {
  const std::int64_t group = shape.num_heads / shape.num_kv_heads;
  switch (order) {
    case QkvOrder::kConcatenated: {
      const std::int64_t heads_before =
          part == kQuery ? 0 : shape.num_heads + (part == kValue ? shape.num_kv_heads : 0);
      return (heads_before + head) * shape.head_dim + d;
    }
    case QkvOrder::kElementwise:
      return (head * shape.head_dim + d) * 3 + part;
    case QkvOrder::kPerGroup: {
      const std::int64_t kv_head = part == kQuery ? head / group : head;
      const std::int64_t slot = part == kQuery ? head % group : group + (part == kValue ? 1 : 0);
      return (kv_head * (group + 2) + slot) * shape.head_dim + d;
    }
  }
  detail::fail("qkv_rows: order must be one of QkvOrder, got ", static_cast<int>(order));
}

bool lies_within(const Range& range, std::int64_t total) {
  return 0 <= range.begin && range.begin <= range.end && range.end <= total;
}

}  // namespace

QkvOrder parse_qkv_order(const std::string& name, const std::string& where) {
  if (name == "concatenated") {
    return QkvOrder::kConcatenated;
  }
  if (name == "elementwise") {
    return QkvOrder::kElementwise;
  }
  MOQ_CHECK(name == "per_group", where, " must be concatenated, elementwise or per_group, got \"",
            name, "\"");
  return QkvOrder::kPerGroup;
}

std::vector<std::int64_t> qkv_rows(QkvOrder order, const QkvShape& shape, const HeadShard& shard) {
  MOQ_CHECK(shape.num_kv_heads >= 1 && shape.num_heads % shape.num_kv_heads == 0,
            "qkv_rows: num_kv_heads must divide num_heads, got ", shape.num_kv_heads, " and ",
            shape.num_heads);
  MOQ_CHECK(order != QkvOrder::kElementwise || shape.num_kv_heads == shape.num_heads,
            "qkv_rows: the elementwise order must have as many KV heads as heads, got ",
            shape.num_kv_heads, " and ", shape.num_heads);
  MOQ_CHECK(lies_within(shard.query_heads, shape.num_heads) &&
                lies_within(shard.kv_heads, shape.num_kv_heads),
            "qkv_rows: the shard must lie within ", shape.num_heads, " heads and ",
            shape.num_kv_heads, " KV heads, got heads up to ", shard.query_heads.end,
            " and KV heads up to ", shard.kv_heads.end);
  std::vector<std::int64_t> rows;
  rows.reserve(static_cast<std::size_t>((shard.query_heads.size() + 2 * shard.kv_heads.size()) *
                                        shape.head_dim));
  for (const Part part : {kQuery, kKey, kValue}) {
    const Range heads = part == kQuery ? shard.query_heads : shard.kv_heads;
    for (std::int64_t head = heads.begin; head < heads.end; ++head) {
      for (std::int64_t d = 0; d < shape.head_dim; ++d) {
        rows.push_back(fused_row(order, shape, part, head, d));
      }
    }
  }
  return rows;
}

std::vector<Range> runs_of(std::span<const std::int64_t> indices) {
  std::vector<Range> runs;
  for (const std::int64_t index : indices) {
    if (runs.empty() || runs.back().end != index) {
      runs.push_back({index, index});
    }
    ++runs.back().end;
  }
  return runs;
}

}  // namespace moq::inference
