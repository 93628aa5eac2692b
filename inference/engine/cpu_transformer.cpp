#include "inference/engine/cpu_transformer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "kernels/activation.h"
#include "kernels/common/check.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "kernels/rotary.h"

namespace moq::inference {
namespace {

namespace cpu = kernels::cpu;

/// Rows of a table in the form that the kernel reads, one a token.
struct ConvertedRows {
  std::vector<float> values;  ///< [num_tokens, hidden_size]
  std::vector<std::int64_t> numbers;
};

/// What token t takes from `table` is its row rows[t]; `converted` keeps the rows of a table that
/// the kernel cannot read where it lies.
kernels::EmbeddingLookup look_up(const Table& table, std::span<const std::int64_t> rows,
                                 ConvertedRows& converted) {
  if (!table.source.has_value()) {
    return {.table = table.view, .rows = rows.data()};
  }
  for (const std::int64_t row : rows) {
    const auto values = table.source->read_values({row, row + 1}, {0, table.source->cols()});
    converted.values.insert(converted.values.end(), values.begin(), values.end());
  }
  converted.numbers.resize(rows.size());
  std::iota(converted.numbers.begin(), converted.numbers.end(), 0);
  const auto count = static_cast<std::int64_t>(rows.size());
  return {.table = {.data = converted.values.data(), .num_rows = count},
          .rows = converted.numbers.data()};
}

}  // namespace

CpuTransformer::CpuTransformer(ModelSpec spec, Weights weights,
                               std::shared_ptr<Communicator> communicator)
    : Transformer(std::move(spec), std::move(weights), std::move(communicator)),
      alibi_slopes_(own_alibi_slopes()) {}

MemoryReport CpuTransformer::memory() const {
  MemoryReport report{.weights = weight_bytes(weights_),
                      .kv_cache = generation_cache_ ? generation_cache_->bytes() : 0};
  for (const AlignedBuffer* buffer :
       {&x_, &normed_, &ffn_in_, &qkv_, &attended_, &up_, &gated_, &head_in_, &logits_}) {
    report.workspace += static_cast<std::int64_t>(buffer->size());
  }
  return report;
}

std::unique_ptr<KvCache> CpuTransformer::make_cache(std::int64_t num_slots, std::int64_t capacity) {
  return std::make_unique<HostKvCache>(spec_.num_layers, kv_heads(), spec_.head_dim, num_slots,
                                       capacity);
}

KvCache& CpuTransformer::generation_cache(std::int64_t num_slots, std::int64_t capacity) {
  generation_cache_.reset();  // the old one's memory first
  generation_cache_ = make_cache(num_slots, capacity);
  return *generation_cache_;
}

at::Tensor CpuTransformer::new_result(at::IntArrayRef sizes) const {
  return at::empty(sizes, at::kFloat);
}

void CpuTransformer::reserve(std::int64_t num_tokens) {
  if (num_tokens <= max_tokens_) {
    return;
  }
  const std::int64_t ffn = weights_.ffn.size();
  reserve_floats(x_, num_tokens * spec_.hidden_size);
  reserve_floats(normed_, num_tokens * spec_.hidden_size);
  reserve_floats(ffn_in_, spec_.parallel_residual ? num_tokens * spec_.hidden_size : 0);
  reserve_floats(qkv_, num_tokens * qkv_width());
  reserve_floats(attended_, num_tokens * q_heads() * spec_.head_dim);
  reserve_floats(up_, num_tokens * ffn * (spec_.gated ? 2 : 1));
  reserve_floats(gated_, spec_.gated ? num_tokens * ffn : 0);
  max_tokens_ = num_tokens;
}

void CpuTransformer::forward(const TokenBatch& batch, KvCache* any_cache) {
  check(batch, any_cache);
  auto* const cache = own_cache<HostKvCache>(any_cache);
  reserve(batch.num_tokens());
  num_tokens_ = batch.num_tokens();
  prepare_positions(batch);
  float* x = x_.as<float>();
  float* normed = normed_.as<float>();
  if (communicator_->size() > 1) {
    shared_x_ = at::from_blob(x, {num_tokens_, spec_.hidden_size}, at::kFloat);
  }

  embed(batch);
  for (std::size_t i = 0; i < weights_.layers.size(); ++i) {
    const Layer& layer = weights_.layers[i];
    const auto index = static_cast<std::int64_t>(i);
    if (spec_.norm_place == NormPlace::kPost) {
      // x = norm(x + attention(x)); x = norm(x + ffn(x))
      attend(x, layer, index, batch, cache);
      project_and_add(attended_.as<float>(), layer.attention_out);
      normalize(x, layer.attention_norm, x, num_tokens_);
      feed_forward(x, layer);
      normalize(x, layer.ffn_norm, x, num_tokens_);
    } else if (spec_.parallel_residual) {
      // x = x + attention(norm1(x)) + ffn(norm2(x))
      normalize(x, layer.ffn_norm, ffn_in_.as<float>(), num_tokens_);
      normalize(x, layer.attention_norm, normed, num_tokens_);
      attend(normed, layer, index, batch, cache);
      project_and_add(attended_.as<float>(), layer.attention_out);
      feed_forward(ffn_in_.as<float>(), layer);
    } else {
      // x = x + attention(norm(x)); x = x + ffn(norm(x))
      normalize(x, layer.attention_norm, normed, num_tokens_);
      attend(normed, layer, index, batch, cache);
      project_and_add(attended_.as<float>(), layer.attention_out);
      normalize(x, layer.ffn_norm, normed, num_tokens_);
      feed_forward(normed, layer);
    }
  }
  if (cache != nullptr) {
    for (const kernels::AttentionSequence& sequence : batch.sequences()) {
      cache->advance(sequence.slot, sequence.num_tokens);
    }
  }
  if (spec_.norm_place == NormPlace::kPre) {
    normalize(x, weights_.final_norm, x, num_tokens_);
  }
}

/// x = token embedding + position embedding + token type embedding, and its norm if there is one.
void CpuTransformer::embed(const TokenBatch& batch) {
  std::array<ConvertedRows, 3> converted;
  std::array<kernels::EmbeddingLookup, 3> lookups{};
  std::size_t count = 0;
  const auto add = [&](const Table& table, std::span<const std::int64_t> rows) {
    lookups[count] = look_up(table, rows, converted[count]);
    ++count;
  };
  add(weights_.token_embedding, batch.token_ids());
  if (spec_.num_token_types > 0) {
    add(weights_.token_type_embedding, batch.token_types());
  }
  if (spec_.positions == PositionKind::kLearned) {
    add(weights_.position_embedding, table_rows_);
  }
  cpu::embedding({.lookups = {lookups.data(), count},
                  .output = x_.as<float>(),
                  .num_tokens = num_tokens_,
                  .hidden_size = spec_.hidden_size});
  if (spec_.embedding_norm) {
    normalize(x_.as<float>(), weights_.embedding_norm, x_.as<float>(), num_tokens_);
  }
}

/// attended = softmax(q kᵀ / sqrt(head_dim)) v of q, k, v = input · Wqkvᵀ, for this rank's heads.
void CpuTransformer::attend(const float* input, const Layer& layer, std::int64_t index,
                            const TokenBatch& batch, HostKvCache* cache) {
  const std::int64_t dim = spec_.head_dim;
  float* q = qkv_.as<float>();
  float* k = q + q_heads() * dim;
  float* v = k + kv_heads() * dim;
  project(input, layer.qkv, q, num_tokens_);
  if (spec_.qk_norm) {
    normalize_heads(layer.query_norm, 0, q_heads());
    normalize_heads(layer.key_norm, q_heads(), kv_heads());
  }
  if (spec_.positions == PositionKind::kRotary) {
    cpu::rotary({.heads = q,  // k lies behind q in each token's row
                 .num_tokens = num_tokens_,
                 .num_heads = q_heads() + kv_heads(),
                 .token_stride = qkv_width(),
                 .head_stride = dim,
                 .rotary_dim = spec_.rotary_dim(),
                 .positions = batch.positions().data(),
                 .cos = rotation_.cos(),
                 .sin = rotation_.sin(),
                 .num_positions = rotation_.num_positions()});
  }
  kernels::AttentionArgs attention{
      .query = q,
      .query_stride = qkv_width(),
      .keys = k,
      .values = v,
      .slot_stride = qkv_width(),
      .kv_head_stride = dim,
      .key_stride = qkv_width(),
      .sequences = packed_sequences_.data(),
      .num_sequences = static_cast<std::int64_t>(batch.sequences().size()),
      .num_heads = q_heads(),
      .num_kv_heads = kv_heads(),
      .head_dim = dim,
      .causal = spec_.attention == AttentionKind::kCausal,
      .scale = 1.0F / std::sqrt(static_cast<float>(dim)),
      .alibi_slopes = alibi_slopes_.empty() ? nullptr : alibi_slopes_.data(),
      .output = attended_.as<float>(),
      .output_stride = q_heads() * dim};
  if (cache != nullptr) {
    cpu::append_kv({.keys = k,
                    .values = v,
                    .token_stride = qkv_width(),
                    .sequences = batch.sequences().data(),
                    .num_sequences = attention.num_sequences,
                    .num_kv_heads = kv_heads(),
                    .head_dim = dim,
                    .key_cache = cache->keys(index),
                    .value_cache = cache->values(index),
                    .num_slots = cache->num_slots(),
                    .capacity = cache->capacity()});
    attention.keys = cache->keys(index);
    attention.values = cache->values(index);
    attention.slot_stride = kv_heads() * cache->capacity() * dim;
    attention.kv_head_stride = cache->capacity() * dim;
    attention.key_stride = dim;
    attention.sequences = batch.sequences().data();
  }
  cpu::attention(attention);
}

/// x += down(activation(up(input))), or x += down(activation(gate(input)) * up(input)).
void CpuTransformer::feed_forward(const float* input, const Layer& layer) {
  const float* inner = up_.as<float>();
  if (spec_.gated) {
    project(input, layer.up, up_.as<float>(), num_tokens_);
    cpu::gated_activation({.gate_up = up_.as<float>(),
                           .output = gated_.as<float>(),
                           .m = num_tokens_,
                           .n = weights_.ffn.size(),
                           .activation = spec_.activation});
    inner = gated_.as<float>();
  } else {
    project(input, layer.up, up_.as<float>(), num_tokens_, spec_.activation);
  }
  project_and_add(inner, layer.down);
}

void CpuTransformer::normalize(const float* input, const Norm& norm, float* output,
                               std::int64_t rows) const {
  const auto epsilon = static_cast<float>(spec_.norm_epsilon);
  if (spec_.norm == NormKind::kRmsNorm) {
    cpu::rms_norm({.input = input,
                   .weight = norm.weight.data(),
                   .output = output,
                   .num_tokens = rows,
                   .hidden_size = spec_.hidden_size,
                   .epsilon = epsilon});
  } else {
    cpu::layer_norm({.input = input,
                     .weight = norm.weight.data(),
                     .bias = norm.bias.empty() ? nullptr : norm.bias.data(),
                     .output = output,
                     .num_tokens = rows,
                     .hidden_size = spec_.hidden_size,
                     .epsilon = epsilon});
  }
}

/// Normalizes heads [first_head, first_head + num_heads) of every token's [q | k | v] row in place.
void CpuTransformer::normalize_heads(const Norm& norm, std::int64_t first_head,
                                     std::int64_t num_heads) {
  for (std::int64_t token = 0; token < num_tokens_; ++token) {
    float* heads = qkv_.as<float>() + token * qkv_width() + first_head * spec_.head_dim;
    cpu::rms_norm({.input = heads,
                   .weight = norm.weight.data(),
                   .output = heads,
                   .num_tokens = num_heads,
                   .hidden_size = spec_.head_dim,
                   .epsilon = static_cast<float>(spec_.norm_epsilon)});
  }
}

/// output = activation(input · Wᵀ + b) for this rank's rows of W.
void CpuTransformer::project(const float* input, const Linear& linear, float* output,
                             std::int64_t rows, kernels::Activation activation) const {
  const kernels::LinearShape& shape = linear.shape();
  cpu::linear({.input = input,
               .m = rows,
               .input_stride = shape.k,
               .weight = linear.weight(),
               .bias = linear.bias_or_null(),
               .activation = activation,
               .input_rounding = linear.input,
               .output = output,
               .output_stride = shape.n});
}

/// x += input · Wᵀ + b, where each rank has the columns of W that belong to its part of the
/// input. Rank 0 brings x itself and the bias into the sum.
void CpuTransformer::project_and_add(const float* input, const Linear& linear) {
  float* x = x_.as<float>();
  const bool root = communicator_->rank() == 0;
  const kernels::LinearShape& shape = linear.shape();
  cpu::linear({.input = input,
               .m = num_tokens_,
               .input_stride = shape.k,
               .weight = linear.weight(),
               .bias = root ? linear.bias_or_null() : nullptr,
               .residual = root ? x : nullptr,
               .residual_stride = root ? shape.n : 0,
               .input_rounding = linear.input,
               .input_extents = shared_extents(input, linear),
               .output = x,
               .output_stride = shape.n});
  if (communicator_->size() > 1) {
    communicator_->all_reduce_sum(shared_x_);
  }
}

/// Extents of whole rows of an input that is split over the ranks, so that all round it to one
/// grid; null where a row needs no grid, or is whole here.
const float* CpuTransformer::shared_extents(const float* input, const Linear& linear) {
  if (communicator_->size() == 1 || !is_dynamic(linear.input.mode)) {
    return nullptr;
  }
  const std::int64_t k = linear.shape().k;
  const QuantMode mode = grid_mode(linear.input.mode);
  const std::int64_t size = is_symmetric(mode) ? num_tokens_ : 2 * num_tokens_;
  extents_.resize(static_cast<std::size_t>(size));
  cpu::row_extents({.input = input,
                    .extents = extents_.data(),
                    .mode = mode,
                    .rows = num_tokens_,
                    .cols = k,
                    .row_stride = k});
  at::Tensor shared = at::from_blob(extents_.data(), {size}, at::kFloat);
  communicator_->all_reduce_max(shared);
  return extents_.data();
}

/// Where attention without a cache finds keys, and what the positions look up.
void CpuTransformer::prepare_positions(const TokenBatch& batch) {
  packed_sequences_.assign(batch.sequences().begin(), batch.sequences().end());
  for (kernels::AttentionSequence& sequence : packed_sequences_) {
    sequence.slot = sequence.token_begin;
  }
  if (spec_.positions == PositionKind::kLearned) {
    table_rows_.assign(batch.positions().begin(), batch.positions().end());
    for (std::int64_t& row : table_rows_) {
      row += spec_.position_offset;
    }
  }
  if (spec_.positions == PositionKind::kRotary) {
    rotation_.reserve(spec_, batch.positions());
  }
}

}  // namespace moq::inference
