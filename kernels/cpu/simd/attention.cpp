#include "kernels/cpu/float_kernels.h"
#include "kernels/cpu/simd/float_math.h"
#include "kernels/cpu/simd/matrix.h"
#include "kernels/cpu/simd/shuffle.h"

/// A tile of query rows meets the keys of its kv head in blocks of kKeyBlock:
///
///   scores  [rows, keys]  = queries x keys^T          a matrix product, or dot products for few
///   rows weights [rows, keys]  = exp(scores - maximum)     the running maximum and sum of each row
///   outputs [rows, dim]   = correction * outputs + weights x values
///
/// A row's sums run in the same order whichever rows share its tile: masked keys have weight zero,
/// and blocks of masked keys change nothing.
namespace moq::kernels::cpu::MOQ_ISA {
namespace {

constexpr std::int64_t kKeyBlock = 128;
/// Up to here dot products with untouched keys cost less than transposing the block for a product.
constexpr std::int64_t kFewRows = 4;
constexpr float kInfinity = __builtin_inff();

/// What lives in the scratch memory while a tile is computed. dim is head_dim rounded up to whole
/// vectors, the columns beyond head_dim are zero.
struct Workspace {
  Matrix<float> queries;  ///< [rows, dim], times the softmax scale
  Matrix<float> outputs;  ///< [rows, dim], not yet divided by the sums
  Matrix<float> scores;   ///< [rows, kKeyBlock]
  float* maxima;          ///< [rows], running maximum of the scores
  float* sums;            ///< [rows], running sum of the weights
  float* corrections;     ///< [rows], what a risen maximum multiplies earlier weights with
  Matrix<float> keys;     ///< [head_dim, kKeyBlock], a block transposed; many rows only
  std::int64_t rows;
  std::int64_t visible[kTileRows];  ///< keys of the block that each row may see; never falls

  Workspace(float* scratch, std::int64_t num_rows, std::int64_t head_dim) : rows(num_rows) {
    const std::int64_t dim = round_up(head_dim);
    const auto take = [&](std::int64_t size) {
      float* part = scratch;
      scratch += size;
      return part;
    };
    queries = {take(rows * dim), dim};
    outputs = {take(rows * dim), dim};
    scores = {take(rows * kKeyBlock), kKeyBlock};
    maxima = take(rows);
    sums = take(rows);
    corrections = take(rows);
    keys = {take(rows > kFewRows ? dim * kKeyBlock : 0), kKeyBlock};
  }
};

/// The part of a row's vector from element d on, whole or filled up with zeros.
[[gnu::always_inline]] inline F32 load_part(const float* row, std::int64_t d, std::int64_t size) {
  return d + kWidth <= size ? load(row + d) : load_first(row + d, size - d);
}

/// output[d, j] = keys[j, d] for `count` <= kKeyBlock keys.
void transpose_keys(Matrix<const float> keys, std::int64_t count, std::int64_t head_dim,
                    Matrix<float> output) {
  for (std::int64_t j = 0; j < count; j += kWidth) {
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

/// scores[r, j] = dot(queries[r], keys[j]) for kRows rows; reads each key once.
template <int kRows>
void score_few_rows(const Workspace& work, Matrix<const float> keys, std::int64_t count,
                    std::int64_t head_dim) {
  for (std::int64_t j = 0; j < count; j += kWidth) {
    F32 products[kRows][kWidth];
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
        products[r][i] = sums[r];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(work.scores.row(r) + j, sum_lanes(products[r]));
    }
  }
}

/// scores[r, j] = dot(queries[r], keys[j]) for at least the visible keys of each row.
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
      multiply<false>({work.queries.data, work.queries.stride}, {work.keys.data, work.keys.stride},
                      nullptr, work.scores, work.rows, [&](std::int64_t r) {
                        return Extent{.k = head_dim, .columns = round_up(work.visible[r])};
                      });
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
    F32 best = broadcast(work.maxima[r]);
    for (std::int64_t j = 0; j < work.visible[r]; j += kWidth) {
      best = maximum(best, visible_scores(r, j));
    }
    const float maximum = reduce_max(best);
    work.corrections[r] = work.maxima[r] - maximum;
    work.maxima[r] = maximum;
  }
  map(
      work.corrections, work.rows, [](F32 x) { return exponential(x); }, work.corrections);
  for (std::int64_t r = 0; r < work.rows; ++r) {
    F32 sum{};
    std::int64_t j = 0;
    for (; j < work.visible[r]; j += kWidth) {
      const F32 weight = exponential(visible_scores(r, j) - work.maxima[r]);
      store(work.scores.row(r) + j, weight);
      sum += weight;
    }
    for (; j < kKeyBlock; j += kWidth) {
      store(work.scores.row(r) + j, F32{});
    }
    work.sums[r] = work.sums[r] * work.corrections[r] + reduce_add(sum);
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

std::int64_t attention_scratch_size(std::int64_t num_rows, std::int64_t head_dim) {
  const std::int64_t dim = round_up(head_dim);
  return num_rows * (2 * dim + kKeyBlock + 3) + (num_rows > kFewRows ? dim * kKeyBlock : 0);
}

void attention_tile(const AttentionArgs& args, const AttentionTile& tile, float* scratch) {
  const AttentionSequence& sequence = *tile.sequence;
  Workspace work(scratch, tile.num_rows, args.head_dim);
  const std::int64_t group = args.num_heads / args.num_kv_heads;
  const auto token_of = [&](std::int64_t r) { return (tile.first_row + r) / group; };
  const auto head_of = [&](std::int64_t r) {
    return tile.kv_head * group + (tile.first_row + r) % group;
  };
  const auto position_of = [&](std::int64_t r) { return sequence.past_length + token_of(r); };
  const auto keys_of = [&](std::int64_t r) {
    return args.causal ? position_of(r) + 1 : sequence.past_length + sequence.num_tokens;
  };

  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    const float* query = args.query + (sequence.token_begin + token_of(r)) * args.query_stride +
                         head_of(r) * args.head_dim;
    for (std::int64_t d = 0; d < args.head_dim; d += kWidth) {
      store(work.queries.row(r) + d, load_part(query, d, args.head_dim) * args.scale);
      store(work.outputs.row(r) + d, F32{});
    }
    work.maxima[r] = -kInfinity;
    work.sums[r] = 0.0F;
  }

  const std::int64_t base = sequence.slot * args.slot_stride + tile.kv_head * args.kv_head_stride;
  const std::int64_t num_keys = keys_of(tile.num_rows - 1);
  for (std::int64_t begin = 0; begin < num_keys; begin += kKeyBlock) {
    const std::int64_t count = num_keys - begin < kKeyBlock ? num_keys - begin : kKeyBlock;
    const std::int64_t offset = base + begin * args.key_stride;
    for (std::int64_t r = 0; r < tile.num_rows; ++r) {
      const std::int64_t keys = keys_of(r) - begin;
      work.visible[r] = keys < 0 ? 0 : keys < count ? keys : count;
    }
    score(work, {args.keys + offset, args.key_stride}, count, args.head_dim);
    if (args.alibi_slopes != nullptr) {
      for (std::int64_t r = 0; r < tile.num_rows; ++r) {
        add_alibi(work.scores.row(r), args.alibi_slopes[head_of(r)], position_of(r), begin);
      }
    }
    weigh(work);
    multiply<true>({work.scores.data, work.scores.stride}, {args.values + offset, args.key_stride},
                   work.corrections, work.outputs, tile.num_rows, [&](std::int64_t r) {
                     return Extent{.k = work.visible[r], .columns = args.head_dim};
                   });
  }

  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    float* output = args.output + (sequence.token_begin + token_of(r)) * args.output_stride +
                    head_of(r) * args.head_dim;
    const F32 sum = broadcast(work.sums[r]);
    map(
        output, args.head_dim, [&](F32 x) { return x / sum; }, work.outputs.row(r));
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
