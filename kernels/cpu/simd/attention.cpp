#include "kernels/cpu/simd/attention.h"

#include "kernels/cpu/simd/float_math.h"
#include "kernels/cpu/simd/matrix.h"
#include "kernels/cpu/simd/shuffle.h"

/// A tile of query rows meets the keys of its span in blocks of kKeyBlock:
///
///   scores  [rows, keys] = queries x keys^T        a matrix product with the keys transposed
///   weights [rows, keys] = exp(scores - maxima)    with the running maximum of each row
///   outputs [rows, dim]  = corrections * outputs + weights x values
///
/// The arithmetic of a row does not show which rows share its tile: dot products are summed in one
/// order (see score), masked keys have weight zero, and blocks of masked keys change nothing.
namespace moq::kernels::cpu::MOQ_ISA {
namespace {

/// Up to here dot products with the keys as they lie cost less than transposing them first.
constexpr std::int64_t kFewRows = 4;
constexpr float kInfinity = __builtin_inff();

/// The rows of a tile in the terms of AttentionArgs.
struct TileRows {
  const AttentionArgs& args;
  const AttentionTile& tile;
  std::int64_t group = args.num_heads / args.num_kv_heads;

  std::int64_t token(std::int64_t r) const { return (tile.first_row + r) / group; }
  std::int64_t head(std::int64_t r) const {
    return tile.kv_head * group + (tile.first_row + r) % group;
  }
  std::int64_t position(std::int64_t r) const { return tile.sequence->past_length + token(r); }
  const float* query(std::int64_t r) const {
    return args.query + (tile.sequence->token_begin + token(r)) * args.query_stride +
           head(r) * args.head_dim;
  }
  float* output(std::int64_t r) const {
    return args.output + (tile.sequence->token_begin + token(r)) * args.output_stride +
           head(r) * args.head_dim;
  }
  /// Keys of a block that row r may see: from first_key on, below end_key.
  std::int64_t visible_keys(std::int64_t r, std::int64_t first_key, std::int64_t end_key) const {
    const std::int64_t end = args.causal && position(r) + 1 < end_key ? position(r) + 1 : end_key;
    return end > first_key ? end - first_key : 0;
  }
};

/// A tile's result, as attention_state_size lays it out.
struct State {
  Matrix<float> outputs;
  float* maxima;
  float* sums;

  State(float* state, std::int64_t rows, std::int64_t head_dim)
      : outputs{state, round_up_to_lines(head_dim)},
        maxima(outputs.row(rows)),
        sums(maxima + rows) {}
};

/// Scratch memory of a tile, as attention_scratch_size counts it, and the state that it updates.
struct Workspace {
  std::int64_t rows;
  State state;
  Matrix<float> queries;  ///< [rows, dim], times the softmax scale, zero beyond head_dim
  Matrix<float> keys;     ///< [dim, kKeyBlock], a block transposed
  Matrix<float> scores;   ///< [rows, kKeyBlock], then the weights
  float* corrections;     ///< [rows], what a risen maximum multiplies earlier weights with
  std::int64_t visible[kTileRows];  ///< keys of the block that each row may see; never falls

  Workspace(float* scratch, float* state_memory, std::int64_t num_rows, std::int64_t head_dim)
      : rows(num_rows),
        state(state_memory, num_rows, head_dim),
        queries{scratch, round_up_to_lines(head_dim)},
        keys{queries.row(rows), kKeyBlock},
        scores{keys.row(round_up_to_lines(head_dim)), kKeyBlock},
        corrections(scores.row(rows)) {}
};

/// The part of a row's vector from element d on, whole or filled up with zeros.
[[gnu::always_inline]] inline F32 load_part(const float* row, std::int64_t d, std::int64_t size) {
  return d + kWidth <= size ? load(row + d) : load_first(row + d, size - d);
}

/// scores[r, j] = dot(queries[r], keys[j]) for kRows rows: a vector of partial sums for each key,
/// then those of kWidth keys transposed and added.
template <int kRows>
void score_few_rows(const Workspace& work, Matrix<const float> keys, std::int64_t count,
                    std::int64_t head_dim) {
  for (std::int64_t j = 0; j < count; j += kWidth) {
    F32 partial[kRows][kWidth];
    for (int i = 0; i < kWidth; ++i) {
      // Behind the last key its products are computed again and masked later.
      const float* key = keys.row(j + i < count ? j + i : count - 1);
      F32 sums[kRows]{};
      for (std::int64_t d = 0; d < head_dim; d += kWidth) {
        const F32 part = load_part(key, d, head_dim);
        for (int r = 0; r < kRows; ++r) {
          sums[r] = multiply_add(load(work.queries.row(r) + d), part, sums[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        partial[r][i] = sums[r];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      transpose(partial[r]);
      F32 score{};
      for (const F32& lane : partial[r]) {
        score += lane;
      }
      store(work.scores.row(r) + j, score);
    }
  }
}

/// output[d, j] = keys[j, d] for `count` <= kKeyBlock keys, zero beyond them and beyond head_dim as
/// far as score_block reads.
void transpose_keys(Matrix<const float> keys, std::int64_t count, std::int64_t head_dim,
                    Matrix<float> output) {
  for (std::int64_t j = 0; j < count + kWidth && j < kKeyBlock; j += kWidth) {
    for (std::int64_t d = 0; d < head_dim; d += kWidth) {
      F32 block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        block[i] = j + i < count ? load_part(keys.row(j + i), d, head_dim) : F32{};
      }
      transpose(block);
      for (int i = 0; i < kWidth; ++i) {
        store(output.row(d + i) + j, block[i]);
      }
    }
  }
}

#if defined(MOQ_ISA_avx512)
constexpr int kScoreRows = 4;
#else
constexpr int kScoreRows = 2;
#endif
constexpr int kScoreVectors = 2;

/// Scores of kScoreRows rows and kScoreVectors vectors of transposed keys, in the order of
/// score_few_rows: the partial sum of elements lane, lane + kWidth, … of each lane in turn.
void score_block(const float* const (&queries)[kScoreRows], Matrix<const float> keys,
                 std::int64_t head_dim, float* const (&scores)[kScoreRows]) {
  F32 totals[kScoreRows][kScoreVectors]{};
  for (std::int64_t lane = 0; lane < kWidth; ++lane) {
    F32 sums[kScoreRows][kScoreVectors]{};
    for (std::int64_t d = lane; d < round_up(head_dim, kWidth); d += kWidth) {
      for (int r = 0; r < kScoreRows; ++r) {
        const F32 element = broadcast(queries[r][d]);
        for (int v = 0; v < kScoreVectors; ++v) {
          sums[r][v] = multiply_add(element, load(keys.row(d) + v * kWidth), sums[r][v]);
        }
      }
    }
    for (int r = 0; r < kScoreRows; ++r) {
      for (int v = 0; v < kScoreVectors; ++v) {
        totals[r][v] += sums[r][v];
      }
    }
  }
  for (int r = 0; r < kScoreRows; ++r) {
    for (int v = 0; v < kScoreVectors; ++v) {
      store(scores[r] + v * kWidth, totals[r][v]);
    }
  }
}

/// The visible scores of all rows, from keys that transpose_keys has put into the workspace.
void score_many_rows(const Workspace& work, std::int64_t head_dim) {
  for (std::int64_t first = 0; first < work.rows; first += kScoreRows) {
    const float* queries[kScoreRows];
    float* scores[kScoreRows];
    std::int64_t visible = 0;
    for (int i = 0; i < kScoreRows; ++i) {
      // Behind the last row its scores are computed again.
      const std::int64_t r = first + i < work.rows ? first + i : work.rows - 1;
      queries[i] = work.queries.row(r);
      scores[i] = work.scores.row(r);
      visible = work.visible[r];
    }
    for (std::int64_t j = 0; j < visible; j += kScoreVectors * kWidth) {
      score_block(queries, {work.keys.data + j, work.keys.stride}, head_dim, scores);
      for (float*& row : scores) {
        row += kScoreVectors * kWidth;
      }
    }
  }
}

/// scores[r, j] = dot(queries[r], keys[j]) for at least the visible keys of each row. Both ways sum
/// in the same order.
void score(const Workspace& work, Matrix<const float> keys, std::int64_t count,
           std::int64_t head_dim) {
  switch (work.rows) {
    case 1:
      return score_few_rows<1>(work, keys, count, head_dim);
    case 2:
      return score_few_rows<2>(work, keys, count, head_dim);
    case 3:
      return score_few_rows<3>(work, keys, count, head_dim);
    case kFewRows:
      return score_few_rows<kFewRows>(work, keys, count, head_dim);
    default:
      transpose_keys(keys, count, head_dim, work.keys);
      score_many_rows(work, head_dim);
  }
}

/// Turns the scores of a block into weights and updates maxima, sums and corrections.
void weigh(const Workspace& work) {
  const auto visible_scores = [&](std::int64_t r, std::int64_t j) {
    const F32 scores = load(work.scores.row(r) + j);
    const I32 is_visible = lane_numbers() < static_cast<std::int32_t>(work.visible[r] - j);
    return j + kWidth <= work.visible[r] ? scores : is_visible ? scores : broadcast(-kInfinity);
  };
  for (std::int64_t r = 0; r < work.rows; ++r) {
    F32 best = broadcast(work.state.maxima[r]);
    for (std::int64_t j = 0; j < work.visible[r]; j += kWidth) {
      best = maximum(best, visible_scores(r, j));
    }
    const float maximum = reduce_max(best);
    // A row that has seen no key yet has nothing to correct.
    work.corrections[r] = work.visible[r] == 0 ? 0.0F : work.state.maxima[r] - maximum;
    work.state.maxima[r] = maximum;
  }
  map(
      work.corrections, work.rows, [](F32 x) { return exponential(x); }, work.corrections);
  for (std::int64_t r = 0; r < work.rows; ++r) {
    F32 sum{};
    std::int64_t j = 0;
    for (; j < work.visible[r]; j += kWidth) {
      const F32 weight = exponential(visible_scores(r, j) - work.state.maxima[r]);
      store(work.scores.row(r) + j, weight);
      sum += weight;
    }
    for (; j < kKeyBlock; j += kWidth) {
      store(work.scores.row(r) + j, F32{});
    }
    work.state.sums[r] = work.state.sums[r] * work.corrections[r] + reduce_add(sum);
  }
}

/// scores[r, j] -= slope * |position - (first_key + j)|
void add_alibi(float* scores, float slope, std::int64_t position, std::int64_t first_key) {
  for (std::int64_t j = 0; j < kKeyBlock; j += kWidth) {
    const I32 distance = lane_numbers() + static_cast<std::int32_t>(first_key + j - position);
    const F32 penalty = slope * absolute(convert<F32>(distance));
    store(scores + j, load(scores + j) - penalty);
  }
}

}  // namespace

void attention_tile(const AttentionArgs& args, const AttentionTile& tile, float* scratch,
                    float* state) {
  const TileRows rows{args, tile};
  Workspace work(scratch, state, tile.num_rows, args.head_dim);
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    for (std::int64_t d = 0; d < args.head_dim; d += kWidth) {
      store(work.queries.row(r) + d, load_part(rows.query(r), d, args.head_dim) * args.scale);
      store(work.state.outputs.row(r) + d, F32{});
    }
    work.state.maxima[r] = -kInfinity;
    work.state.sums[r] = 0.0F;
  }
  const std::int64_t base =
      tile.sequence->slot * args.slot_stride + tile.kv_head * args.kv_head_stride;
  for (std::int64_t key = tile.first_key; key < tile.end_key; key += kKeyBlock) {
    const std::int64_t count = tile.end_key - key < kKeyBlock ? tile.end_key - key : kKeyBlock;
    const std::int64_t offset = base + key * args.key_stride;
    for (std::int64_t r = 0; r < tile.num_rows; ++r) {
      work.visible[r] = rows.visible_keys(r, key, key + count);
    }
    score(work, {args.keys + offset, args.key_stride}, count, args.head_dim);
    if (args.alibi_slopes != nullptr) {
      for (std::int64_t r = 0; r < tile.num_rows; ++r) {
        add_alibi(work.scores.row(r), args.alibi_slopes[rows.head(r)], rows.position(r), key);
      }
    }
    weigh(work);
    multiply_add({work.scores.data, work.scores.stride}, {args.values + offset, args.key_stride},
                 work.corrections, work.state.outputs, tile.num_rows, args.head_dim,
                 [&](std::int64_t r) { return work.visible[r]; });
  }
}

void merge_attention(const AttentionArgs& args, std::int64_t num_rows, float* state,
                     float* later_state) {
  const State merged(state, num_rows, args.head_dim);
  const State later(later_state, num_rows, args.head_dim);
  for (std::int64_t r = 0; r < num_rows; ++r) {
    // A span in which the row sees no key has maximum -infinity and is not added.
    const F32 before = broadcast(merged.maxima[r]);
    const F32 after = broadcast(later.maxima[r]);
    const F32 largest = maximum(before, after);
    const F32 kept = exponential(before - largest);
    const F32 added = exponential(after - largest);
    const auto add = [&](F32 x, F32 y) { return multiply_add(x, kept, y * added); };
    map(merged.outputs.row(r), args.head_dim, add, merged.outputs.row(r), later.outputs.row(r));
    map(merged.sums + r, 1, add, merged.sums + r, later.sums + r);
    merged.maxima[r] = reduce_max(largest);
  }
}

void finish_attention(const AttentionArgs& args, const AttentionTile& tile, float* state) {
  const TileRows rows{args, tile};
  const State result(state, tile.num_rows, args.head_dim);
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    const F32 sum = broadcast(result.sums[r]);
    map(
        rows.output(r), args.head_dim, [&](F32 x) { return x / sum; }, result.outputs.row(r));
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
