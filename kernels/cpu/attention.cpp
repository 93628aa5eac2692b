#include "kernels/attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/float_kernels.h"

namespace moq::kernels::cpu {
namespace {

void check(const AppendKvArgs& args) {
  MOQ_CHECK(args.num_sequences >= 0, "append_kv: num_sequences must be >= 0, got ",
            args.num_sequences);
  MOQ_CHECK(args.num_kv_heads >= 1 && args.head_dim >= 1,
            "append_kv: num_kv_heads and head_dim must be >= 1, got ", args.num_kv_heads, " and ",
            args.head_dim);
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    MOQ_CHECK(sequence.slot >= 0 && sequence.slot < args.num_slots,
              "append_kv: slot must be in [0, ", args.num_slots, "), got ", sequence.slot);
    MOQ_CHECK(sequence.num_tokens >= 0 && sequence.past_length >= 0 &&
                  sequence.past_length + sequence.num_tokens <= args.capacity,
              "append_kv: a sequence must fit into the cache's capacity of ", args.capacity,
              " positions, got ", sequence.num_tokens, " new tokens after ", sequence.past_length);
  }
}

void check(const AttentionArgs& args) {
  MOQ_CHECK(args.num_sequences >= 0, "attention: num_sequences must be >= 0, got ",
            args.num_sequences);
  MOQ_CHECK(args.num_kv_heads >= 1 && args.head_dim >= 1,
            "attention: num_kv_heads and head_dim must be >= 1, got ", args.num_kv_heads, " and ",
            args.head_dim);
  MOQ_CHECK(args.num_heads >= 1 && args.num_heads % args.num_kv_heads == 0,
            "attention: num_heads must be a multiple of num_kv_heads, got ", args.num_heads,
            " and ", args.num_kv_heads);
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    MOQ_CHECK(sequence.num_tokens >= 0 && sequence.past_length >= 0 && sequence.slot >= 0,
              "attention: num_tokens, past_length and slot must be >= 0, got ", sequence.num_tokens,
              ", ", sequence.past_length, " and ", sequence.slot);
  }
}

/// Every tile of the batch, those of one kv head in a row: neighbours in a thread's range share
/// keys.
std::vector<AttentionTile> tiles_of(const AttentionArgs& args) {
  const std::int64_t group = args.num_heads / args.num_kv_heads;
  std::vector<AttentionTile> tiles;
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    const std::int64_t rows = sequence.num_tokens * group;
    for (std::int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head) {
      for (std::int64_t row = 0; row < rows; row += kTileRows) {
        tiles.push_back({&sequence, kv_head, row, std::min(kTileRows, rows - row)});
      }
    }
  }
  return tiles;
}

}  // namespace

void append_kv(const AppendKvArgs& args) {
  check(args);
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    parallel_for(sequence.num_tokens, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t row = (sequence.token_begin + i) * args.token_stride;
        for (std::int64_t h = 0; h < args.num_kv_heads; ++h) {
          const std::int64_t position =
              (sequence.slot * args.num_kv_heads + h) * args.capacity + sequence.past_length + i;
          std::copy_n(args.keys + row + h * args.head_dim, args.head_dim,
                      args.key_cache + position * args.head_dim);
          std::copy_n(args.values + row + h * args.head_dim, args.head_dim,
                      args.value_cache + position * args.head_dim);
        }
      }
    });
  }
}

void attention(const AttentionArgs& args) {
  check(args);
  const std::vector<AttentionTile> tiles = tiles_of(args);
  std::int64_t most_rows = 0;
  for (const AttentionTile& tile : tiles) {
    most_rows = std::max(most_rows, tile.num_rows);
  }
  const std::int64_t scratch_size =
      MOQ_DISPATCH_ISA(attention_scratch_size, most_rows, args.head_dim);
  parallel_for(
      static_cast<std::int64_t>(tiles.size()), 1, [&](std::int64_t begin, std::int64_t end) {
        const auto scratch =
            std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(scratch_size));
        for (std::int64_t i = begin; i < end; ++i) {
          MOQ_DISPATCH_ISA(attention_tile, args, tiles[static_cast<std::size_t>(i)], scratch.get());
        }
      });
}

}  // namespace moq::kernels::cpu
