#include "kernels/attention.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/integer_math.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/aligned_floats.h"
#include "kernels/cpu/simd/attention.h"

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

/// Keys that are summed before they are merged with the ones before: the same everywhere, because
/// the order of a row's sums depends on it.
constexpr std::int64_t kSpanKeys = 256;

/// A tile over all of its keys.
struct SplitTile : AttentionTile {
  bool is_split;              ///< its spans are dealt to threads one by one
  std::int64_t state_offset;  ///< of the spans' states, floats; split tiles only

  std::int64_t num_spans() const { return divide_up(end_key, kSpanKeys); }
  AttentionTile span(std::int64_t i) const {
    AttentionTile part = *this;
    part.first_key = i * kSpanKeys;
    part.end_key = std::min(part.first_key + kSpanKeys, end_key);
    return part;
  }
};

/// A piece of work for one thread: some spans of a tile.
struct Piece {
  std::size_t tile;
  std::int64_t first_span;
  std::int64_t end_span;
};

/// Everything that a call computes.
struct Plan {
  std::vector<SplitTile> tiles;
  std::vector<Piece> pieces;
  std::int64_t most_rows = 0;    ///< of a tile
  std::int64_t states_size = 0;  ///< floats, of all split tiles

  void add(const AttentionTile& tile, bool is_split, std::int64_t head_dim) {
    const SplitTile split{tile, is_split, states_size};
    const std::int64_t step = is_split ? 1 : split.num_spans();
    for (std::int64_t span = 0; span < split.num_spans(); span += step) {
      pieces.push_back({tiles.size(), span, span + step});
    }
    most_rows = std::max(most_rows, tile.num_rows);
    if (is_split) {
      states_size += split.num_spans() * attention_state_size(tile.num_rows, head_dim);
    }
    tiles.push_back(split);
  }
};

/// Tiles of one kv head follow each other: neighbours in a thread's range share keys. Where all
/// rows of a kv head fit one tile, as in decoding, tiles are too few for many threads, and are
/// split.
Plan make_plan(const AttentionArgs& args) {
  const std::int64_t group = args.num_heads / args.num_kv_heads;
  Plan plan;
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const AttentionSequence& sequence = args.sequences[s];
    const std::int64_t rows = sequence.num_tokens * group;
    for (std::int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head) {
      for (std::int64_t row = 0; row < rows; row += kTileRows) {
        const std::int64_t num_rows = std::min(kTileRows, rows - row);
        const std::int64_t last_token =
            args.causal ? (row + num_rows - 1) / group : sequence.num_tokens - 1;
        const std::int64_t num_keys = sequence.past_length + last_token + 1;
        plan.add({.sequence = &sequence,
                  .kv_head = kv_head,
                  .first_row = row,
                  .num_rows = num_rows,
                  .first_key = 0,
                  .end_key = num_keys},
                 rows <= kTileRows && num_keys > kSpanKeys, args.head_dim);
      }
    }
  }
  return plan;
}

/// Attends a tile to some of its spans, one after the other.
void attend(const AttentionArgs& args, const SplitTile& tile, const Piece& piece, float* scratch,
            float* state, float* later_state) {
  MOQ_DISPATCH_ISA(attention_tile, args, tile.span(piece.first_span), scratch, state);
  for (std::int64_t span = piece.first_span + 1; span < piece.end_span; ++span) {
    MOQ_DISPATCH_ISA(attention_tile, args, tile.span(span), scratch, later_state);
    MOQ_DISPATCH_ISA(merge_attention, args, tile.num_rows, state, later_state);
  }
}

/// Merges the states of a split tile in the order in which `attend` would have.
void finish_split(const AttentionArgs& args, const SplitTile& tile, float* states) {
  const std::int64_t size = attention_state_size(tile.num_rows, args.head_dim);
  for (std::int64_t span = 1; span < tile.num_spans(); ++span) {
    MOQ_DISPATCH_ISA(merge_attention, args, tile.num_rows, states, states + span * size);
  }
  MOQ_DISPATCH_ISA(finish_attention, args, tile, states);
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
  const Plan plan = make_plan(args);
  const AlignedFloats states = make_aligned_floats(plan.states_size);
  const std::int64_t scratch_size = attention_scratch_size(plan.most_rows, args.head_dim);
  const std::int64_t state_size = attention_state_size(plan.most_rows, args.head_dim);
  parallel_for(std::ssize(plan.pieces), 1, [&](std::int64_t begin, std::int64_t end) {
    const AlignedFloats memory = make_aligned_floats(scratch_size + 2 * state_size);
    float* own_state = memory.get() + scratch_size;
    for (std::int64_t i = begin; i < end; ++i) {
      const Piece& piece = plan.pieces[static_cast<std::size_t>(i)];
      const SplitTile& tile = plan.tiles[piece.tile];
      float* state = !tile.is_split ? own_state
                                    : states.get() + tile.state_offset +
                                          piece.first_span *
                                              attention_state_size(tile.num_rows, args.head_dim);
      attend(args, tile, piece, memory.get(), state, own_state + state_size);
      if (!tile.is_split) {
        MOQ_DISPATCH_ISA(finish_attention, args, tile, state);
      }
    }
  });
  if (plan.states_size > 0) {
    parallel_for(std::ssize(plan.tiles), 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const SplitTile& tile = plan.tiles[static_cast<std::size_t>(i)];
        if (tile.is_split) {
          finish_split(args, tile, states.get() + tile.state_offset);
        }
      }
    });
  }
}

}  // namespace moq::kernels::cpu
