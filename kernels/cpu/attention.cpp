#include "kernels/attention.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"
#include "kernels/cpu/aligned_floats.h"
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

/// Keys of a span. Sums depend on it, so it is the same on every machine.
constexpr std::int64_t kSpanKeys = 256;

/// A tile over all of its keys, and how many spans they are divided into.
struct SplitTile {
  AttentionTile tile;
  std::int64_t num_spans;
  std::int64_t state_offset;  ///< of the spans' states, floats; several spans only

  AttentionTile span(std::int64_t i) const {
    AttentionTile part = tile;
    part.first_key = i * kSpanKeys;
    part.end_key = std::min(part.first_key + kSpanKeys, tile.end_key);
    return part;
  }
};

/// Everything that a call computes.
struct Plan {
  std::vector<SplitTile> tiles;
  std::vector<std::pair<std::size_t, std::int64_t>> spans;  ///< (tile, number of the span)
  std::int64_t most_rows = 0;                               ///< of a tile
  std::int64_t states_size = 0;  ///< floats, of all tiles that have several spans
};

/// Tiles of one kv head follow each other: neighbours in a thread's range share keys. Where all
/// rows of a kv head fit one tile, as in decoding, tiles are too few for many threads, and their
/// keys are divided into spans.
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
        const std::int64_t num_spans =
            rows <= kTileRows ? (num_keys + kSpanKeys - 1) / kSpanKeys : 1;
        for (std::int64_t span = 0; span < num_spans; ++span) {
          plan.spans.emplace_back(plan.tiles.size(), span);
        }
        plan.tiles.push_back({.tile = {.sequence = &sequence,
                                       .kv_head = kv_head,
                                       .first_row = row,
                                       .num_rows = num_rows,
                                       .first_key = 0,
                                       .end_key = num_keys},
                              .num_spans = num_spans,
                              .state_offset = plan.states_size});
        plan.most_rows = std::max(plan.most_rows, num_rows);
        if (num_spans > 1) {
          plan.states_size += num_spans * attention_state_size(num_rows, args.head_dim);
        }
      }
    }
  }
  return plan;
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
  const std::int64_t own_state_size = attention_state_size(plan.most_rows, args.head_dim);
  parallel_for(std::ssize(plan.spans), 1, [&](std::int64_t begin, std::int64_t end) {
    const AlignedFloats scratch = make_aligned_floats(scratch_size + own_state_size);
    float* own_state = scratch.get() + scratch_size;
    for (std::int64_t i = begin; i < end; ++i) {
      const auto [tile_number, span] = plan.spans[static_cast<std::size_t>(i)];
      const SplitTile& split = plan.tiles[tile_number];
      if (split.num_spans == 1) {
        MOQ_DISPATCH_ISA(attention_tile, args, split.tile, scratch.get(), own_state);
        MOQ_DISPATCH_ISA(finish_attention, args, split.tile, own_state, 1);
      } else {
        const std::int64_t size = attention_state_size(split.tile.num_rows, args.head_dim);
        MOQ_DISPATCH_ISA(attention_tile, args, split.span(span), scratch.get(),
                         states.get() + split.state_offset + span * size);
      }
    }
  });
  if (plan.states_size == 0) {
    return;
  }
  parallel_for(std::ssize(plan.tiles), 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const SplitTile& split = plan.tiles[static_cast<std::size_t>(i)];
      if (split.num_spans > 1) {
        MOQ_DISPATCH_ISA(finish_attention, args, split.tile, states.get() + split.state_offset,
                         split.num_spans);
      }
    }
  });
}

}  // namespace moq::kernels::cpu
