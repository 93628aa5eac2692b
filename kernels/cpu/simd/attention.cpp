#include "kernels/cpu/float_kernels.h"
#include "kernels/cpu/simd/float_math.h"
#include "kernels/cpu/simd/shuffle.h"

/// A tile of query rows meets the keys of its kv head in blocks of kKeyBlock:
///
///   scores  [rows, keys]  = queries x keys^T          a matrix product, or dot products for few
///   rows weights [rows, keys]  = exp(scores - maximum)     the running maximum and sum of each row
///   outputs [rows, dim]   = correction * outputs + weights x values
///
/// A row's sums run in the same order whichever rows share its tile: masked keys have weight zero, and
/// blocks of masked keys change nothing.
namespace moq::kernels::cpu::MOQ_ISA {
namespace {

constexpr std::int64_t kKeyBlock = 64;
/// Up to here dot products with untouched keys cost less than transposing the block for a product.
constexpr std::int64_t kFewRows = 4;
constexpr float kInfinity = __builtin_inff();

constexpr std::int64_t round_up(std::int64_t size) {
  return (size + kWidth - 1) / kWidth * kWidth;
}

/// [rows, cols] floats, rows `stride` apart.
template <typename Float>
struct Matrix {
  Float* data;
  std::int64_t stride;

  Float* row(std::int64_t i) const { return data + i * stride; }
};

/// What lives in the scratch memory while a tile is computed. dim is head_dim rounded up to whole
/// vectors, the columns beyond head_dim are zero.
struct Workspace {
  Matrix<float> queries;  ///< [rows, dim], times the softmax scale
  Matrix<float> outputs;  ///< [rows, dim], not yet divided by the sums
  Matrix<float> scores;   ///< [rows, kKeyBlock]
  float* maxima;          ///< [rows]
  float* sums;            ///< [rows]
  float* corrections;     ///< [rows]
  Matrix<float> keys;     ///< [head_dim, kKeyBlock], a block transposed; many rows only

  Workspace(float* scratch, std::int64_t rows, std::int64_t head_dim) {
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

/// output[r, :] = (kAdd ? factors[r] * output[r, :] : 0) + a[r, 0:k] x b[0:k, :] for kRows rows and
/// kVectors vectors of columns, the last of which has `last` columns.
template <bool kAdd, int kRows, int kVectors>
void multiply_block(Matrix<const float> a, Matrix<const float> b, const float* factors,
                    Matrix<float> output, std::int64_t k, std::int64_t last) {
  F32 sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = kAdd ? load(output.row(r) + v * kWidth) * factors[r] : F32{};
    }
  }
  const auto step = [&](std::int64_t i, const auto& load_last) {
    F32 vectors[kVectors];
    for (int v = 0; v + 1 < kVectors; ++v) {
      vectors[v] = load(b.row(i) + v * kWidth);
    }
    vectors[kVectors - 1] = load_last(b.row(i) + (kVectors - 1) * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const F32 factor = broadcast(a.row(r)[i]);
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = multiply_add(factor, vectors[v], sums[r][v]);
      }
    }
  };
  if (last == kWidth) {
    for (std::int64_t i = 0; i < k; ++i) {
      step(i, [](const float* x) { return load(x); });
    }
  } else {
    for (std::int64_t i = 0; i < k; ++i) {
      step(i, [&](const float* x) { return load_first(x, last); });
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      store(output.row(r) + v * kWidth, sums[r][v]);
    }
  }
}

#if defined(MOQ_ISA_avx512)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif
constexpr int kBlockRows = 4;

/// multiply_block over all columns of kRows rows.
template <bool kAdd, int kRows>
void multiply_rows(Matrix<const float> a, Matrix<const float> b, const float* factors,
                   Matrix<float> output, std::int64_t k, std::int64_t columns) {
  std::int64_t j = 0;
  const auto at = [&](auto matrix) {
    matrix.data += j;
    return matrix;
  };
  for (; j + kBlockVectors * kWidth <= columns; j += kBlockVectors * kWidth) {
    multiply_block<kAdd, kRows, kBlockVectors>(a, at(b), factors, at(output), k, kWidth);
  }
  for (; j < columns; j += kWidth) {
    const std::int64_t last = columns - j < kWidth ? columns - j : kWidth;
    multiply_block<kAdd, kRows, 1>(a, at(b), factors, at(output), k, last);
  }
}

/// output [rows, columns] = (kAdd ? factors * output : 0) + a [rows, k] x b [k, columns]. The
/// output's rows have room for whole vectors.
template <bool kAdd>
void multiply(Matrix<const float> a, Matrix<const float> b, const float* factors,
              Matrix<float> output, std::int64_t rows, std::int64_t k, std::int64_t columns) {
  for (std::int64_t r = 0; r < rows; r += kBlockRows) {
    const Matrix<const float> a_rows{a.row(r), a.stride};
    const Matrix<float> output_rows{output.row(r), output.stride};
    const float* row_factors = kAdd ? factors + r : nullptr;
    switch (rows - r) {
      case 1:
        multiply_rows<kAdd, 1>(a_rows, b, row_factors, output_rows, k, columns);
        break;
      case 2:
        multiply_rows<kAdd, 2>(a_rows, b, row_factors, output_rows, k, columns);
        break;
      case 3:
        multiply_rows<kAdd, 3>(a_rows, b, row_factors, output_rows, k, columns);
        break;
      default:
        multiply_rows<kAdd, kBlockRows>(a_rows, b, row_factors, output_rows, k, columns);
    }
  }
}

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

void score(const Workspace& work, Matrix<const float> keys, std::int64_t rows, std::int64_t count,
           std::int64_t head_dim) {
  switch (rows) {
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
                      nullptr, work.scores, rows, head_dim, kKeyBlock);
  }
}

/// Turns row r's scores of a block, of which the first `visible` count, into weights and updates
/// the row's maximum, sum and correction.
void weigh(const Workspace& work, std::int64_t r, std::int64_t visible) {
  float* scores = work.scores.row(r);
  F32 best = broadcast(work.maxima[r]);
  for (std::int64_t j = 0; j < kKeyBlock; j += kWidth) {
    const I32 key = lane_numbers() + static_cast<std::int32_t>(j);
    const F32 seen =
        key < static_cast<std::int32_t>(visible) ? load(scores + j) : broadcast(-kInfinity);
    store(scores + j, seen);
    best = maximum(best, seen);
  }
  const float maximum = reduce_max(best);
  F32 sum{};
  for (std::int64_t j = 0; j < kKeyBlock; j += kWidth) {
    const F32 weight = exponential(load(scores + j) - maximum);
    store(scores + j, weight);
    sum += weight;
  }
  float correction[kWidth];
  store(correction, exponential(broadcast(work.maxima[r] - maximum)));
  work.corrections[r] = correction[0];
  work.sums[r] = work.sums[r] * correction[0] + reduce_add(sum);
  work.maxima[r] = maximum;
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
  const Workspace work(scratch, tile.num_rows, args.head_dim);
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
    score(work, {args.keys + offset, args.key_stride}, tile.num_rows, count, args.head_dim);
    for (std::int64_t r = 0; r < tile.num_rows; ++r) {
      if (args.alibi_slopes != nullptr) {
        add_alibi(work.scores.row(r), args.alibi_slopes[head_of(r)], position_of(r), begin);
      }
      weigh(work, r, keys_of(r) - begin);
    }
    multiply<true>({work.scores.data, work.scores.stride}, {args.values + offset, args.key_stride},
                   work.corrections, work.outputs, tile.num_rows, count, args.head_dim);
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
