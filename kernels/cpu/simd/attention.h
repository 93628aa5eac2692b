#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/common/integer_math.h"
#include "kernels/cpu/isa.h"

/// What kernels/cpu/attention.cpp asks of each instruction set: parts of the work that one thread
/// does, without checks.
namespace moq::kernels::cpu {

/// Query rows that share a kv head, and a span of its keys: what one thread takes at once. Row r is
/// token r / group, query head r % group of the head's group (group = num_heads / num_kv_heads).
struct AttentionTile {
  const AttentionSequence* sequence;
  std::int64_t kv_head;
  std::int64_t first_row;
  std::int64_t num_rows;  ///< in [1, kTileRows]
  std::int64_t first_key;
  std::int64_t end_key;  ///< not above the keys that the last row may see
};

/// Rows of a tile at most: enough to transpose a block of keys for.
constexpr std::int64_t kTileRows = 64;
/// Keys that a tile takes at a time.
constexpr std::int64_t kKeyBlock = 128;

/// Floats of whole cache lines, and so of whole vectors of every instruction set.
constexpr std::int64_t round_up_to_lines(std::int64_t floats) {
  return round_up(floats, 16);
}

/// Floats of a tile's result: outputs [num_rows, dim] that are not yet divided by the sums, dim
/// being head_dim in whole lines; maxima [num_rows] of the scores, sums [num_rows] of the weights.
constexpr std::int64_t attention_state_size(std::int64_t num_rows, std::int64_t head_dim) {
  return num_rows * round_up_to_lines(head_dim) + round_up_to_lines(2 * num_rows);
}

/// Floats of scratch memory that attention_tile needs: queries, a block of keys transposed, scores
/// and one more number per row.
constexpr std::int64_t attention_scratch_size(std::int64_t num_rows, std::int64_t head_dim) {
  return (num_rows + kKeyBlock) * round_up_to_lines(head_dim) + num_rows * kKeyBlock +
         round_up_to_lines(num_rows);
}

// clang-format off
MOQ_FOR_EACH_ISA(
  /// Attends a tile to its span of keys. scratch and state begin at a cache line.
  void attention_tile(const AttentionArgs& args, const AttentionTile& tile, float* scratch,
                      float* state);
  /// Adds the state of the next span to that of the spans before it.
  void merge_attention(const AttentionArgs& args, std::int64_t num_rows, float* state,
                       float* later_state);
  /// Writes the outputs of a tile whose state covers all of its keys.
  void finish_attention(const AttentionArgs& args, const AttentionTile& tile, float* state);
)
// clang-format on

}  // namespace moq::kernels::cpu
