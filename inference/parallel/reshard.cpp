#include "inference/parallel/reshard.h"

#include <cstring>
#include <numeric>

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

void check_move(const char* where, std::size_t whole_bytes, std::size_t part_bytes,
                const AxisView& view, std::span<const std::int64_t> indices) {
  const auto wanted = [&](std::int64_t count) {
    return static_cast<std::size_t>(view.outer * count * view.inner_bytes);
  };
  MOQ_CHECK(whole_bytes == wanted(view.count), where, ": the whole must have ", wanted(view.count),
            " bytes, got ", whole_bytes);
  const auto num_indices = static_cast<std::int64_t>(indices.size());
  MOQ_CHECK(part_bytes == wanted(num_indices), where, ": the part must have ", wanted(num_indices),
            " bytes, got ", part_bytes);
  for (const std::int64_t index : indices) {
    MOQ_CHECK(index >= 0 && index < view.count, where, ": indices must be in [0, ", view.count,
              "), got ", index);
  }
}

/// Calls move(index of the piece in the whole, index of the piece in the part) for all pieces.
template <typename Move>
void for_each_piece(const AxisView& view, std::span<const std::int64_t> indices, Move move) {
  std::int64_t piece = 0;
  for (std::int64_t outer = 0; outer < view.outer; ++outer) {
    for (const std::int64_t index : indices) {
      move((outer * view.count + index) * view.inner_bytes, piece * view.inner_bytes);
      ++piece;
    }
  }
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

std::vector<std::int64_t> indices_of(Range range) {
  std::vector<std::int64_t> indices(static_cast<std::size_t>(range.size()));
  std::iota(indices.begin(), indices.end(), range.begin);
  return indices;
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

ColumnGroups shard_groups(Range columns, std::int64_t group_size) {
  MOQ_CHECK(group_size >= 1 && lies_within(columns, columns.end),
            "shard_groups: group_size must be >= 1 and 0 <= begin <= end, got ", group_size,
            " and [", columns.begin, ", ", columns.end, ")");
  ColumnGroups groups;
  groups.group_size = std::gcd(std::gcd(group_size, columns.begin), columns.end);
  for (std::int64_t column = columns.begin; column < columns.end; column += groups.group_size) {
    groups.scale_columns.push_back(column / group_size);
  }
  return groups;
}

void gather(std::span<const std::byte> whole, const AxisView& view,
            std::span<const std::int64_t> indices, std::span<std::byte> part) {
  check_move("gather", whole.size(), part.size(), view, indices);
  for_each_piece(view, indices, [&](std::int64_t in_whole, std::int64_t in_part) {
    std::memcpy(part.data() + in_part, whole.data() + in_whole,
                static_cast<std::size_t>(view.inner_bytes));
  });
}

void scatter(std::span<const std::byte> part, const AxisView& view,
             std::span<const std::int64_t> indices, std::span<std::byte> whole) {
  check_move("scatter", whole.size(), part.size(), view, indices);
  for_each_piece(view, indices, [&](std::int64_t in_whole, std::int64_t in_part) {
    std::memcpy(whole.data() + in_whole, part.data() + in_part,
                static_cast<std::size_t>(view.inner_bytes));
  });
}

}  // namespace moq::inference
