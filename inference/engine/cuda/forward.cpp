// The forward pass of a transformer on a GPU.
#include <ATen/ops/from_blob.h>
#include <cuda_runtime_api.h>

#include <cmath>

#include "inference/engine/cuda/on_device.h"
#include "inference/engine/cuda/transformer.h"
#include "kernels/attention.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "kernels/qkv_attention.h"

namespace moq::inference::cuda {

namespace gpu = kernels::cuda;

at::Tensor CudaTransformer::rows_of_x(std::int64_t count) const {
  return at::from_blob(workspace_.x, {count, spec_.hidden_size},
                       at::TensorOptions(scalar_type(dtype_)).device(device_));
}

/// x = what the final norm gets.
void CudaTransformer::run_layers(const Step& step) {
  num_tokens_ = step.num_tokens;
  const std::int64_t m = num_tokens_;
  x_ = rows_of_x(m);
  if (is_decode_step(step)) {
    run_decode_step(step);
    return;
  }
  const void* x = workspace_.x;
  embed(step, workspace_.x);
  for (std::size_t i = 0; i < device_weights_.layers.size(); ++i) {
    const DeviceLayer& layer = device_weights_.layers[i];
    const auto index = static_cast<std::int64_t>(i);
    if (spec_.norm_place == NormPlace::kPost) {
      // x = norm(x + attention(x)); x = norm(x + ffn(x))
      attend(x, {}, layer, index, step);
      add_attended(layer, m);
      normalize(x, layer.attention_norm, workspace_.x, m);
      feed_forward(x, {}, layer, m);
      add_inner(layer, m);
      if (i + 1 < device_weights_.layers.size()) {  // the last one is the final norm
        normalize(x, layer.ffn_norm, workspace_.x, m);
      }
    } else if (spec_.parallel_residual) {
      // x = x + attention(norm1(x)) + ffn(norm2(x))
      attend(x, layer.attention_norm, layer, index, step);
      feed_forward(x, layer.ffn_norm, layer, m);
      add_attended(layer, m);
      add_inner(layer, m);
    } else {
      // x = x + attention(norm(x)); x = x + ffn(norm(x))
      attend(x, layer.attention_norm, layer, index, step);
      add_attended(layer, m);
      feed_forward(x, layer.ffn_norm, layer, m);
      add_inner(layer, m);
    }
  }
}

/// output = token embedding + token type embedding + position embedding, and its norm if there is
/// one.
void CudaTransformer::embed(const Step& step, void* output) {
  kernels::DeviceEmbeddingArgs args{.output = output,
                                    .num_tokens = step.num_tokens,
                                    .hidden_size = spec_.hidden_size,
                                    .dtype = dtype_};
  const auto add = [&](kernels::DeviceEmbeddingLookup lookup, const std::int32_t* rows) {
    lookup.rows = rows;
    args.lookups[args.num_lookups++] = lookup;
  };
  add(device_weights_.token_embedding, step.inputs.tokens());
  if (spec_.num_token_types > 0) {
    add(device_weights_.token_type_embedding, step.inputs.token_types());
  }
  if (spec_.positions == PositionKind::kLearned) {
    add(device_weights_.position_embedding, step.inputs.positions());
  }
  launch("embedding", step.num_tokens, spec_.hidden_size, 0,
         [&] { gpu::embedding(args, stream_); });
  if (spec_.embedding_norm) {
    normalize(output, device_weights_.embedding_norm, output, step.num_tokens);
  }
}

/// attended = softmax(q kᵀ / sqrt(head_dim)) v of q, k, v = norm(input) · Wqkvᵀ, for this rank's
/// heads.
void CudaTransformer::attend(const void* input, const kernels::DeviceNorm& norm,
                             const DeviceLayer& layer, std::int64_t index, const Step& step) {
  const std::int64_t m = step.num_tokens;
  const kernels::DevicePages pages =
      step.cache == nullptr ? kernels::DevicePages{} : step.cache->pages(index);
  kernels::DeviceRotary rotary{};
  if (spec_.positions == PositionKind::kRotary) {
    rotary = {.rotary_dim = static_cast<std::int32_t>(spec_.rotary_dim()),
              .positions = step.inputs.positions(),
              .cos = static_cast<const float*>(cos_.const_data_ptr()),
              .sin = static_cast<const float*>(sin_.const_data_ptr())};
  }
  const bool rotated_by_projection = rotates_in_pairs(spec_);
  const bool rotated_apart = rotary.rotary_dim > 0 && !rotated_by_projection;
  const bool appended_by_projection = step.cache != nullptr && pages.dtype == dtype_ &&
                                      !rotated_apart && !spec_.qk_norm && spec_.head_dim % 2 == 0;
  const bool appended_apart = step.cache != nullptr && !appended_by_projection;
  const std::int64_t row_width = appended_by_projection ? q_heads() * spec_.head_dim : qkv_width();
  kernels::DeviceLinearArgs projection{
      .m = m, .output = workspace_.qkv, .output_stride = row_width};
  if (rotated_by_projection || appended_by_projection) {
    projection.qkv = {.head_dim = static_cast<std::int32_t>(spec_.head_dim),
                      .num_heads = static_cast<std::int32_t>(q_heads()),
                      .num_kv_heads = static_cast<std::int32_t>(kv_heads()),
                      .rotary = rotated_by_projection ? rotary : kernels::DeviceRotary{},
                      .pages = appended_by_projection ? pages : kernels::DevicePages{},
                      .cache_rows = step.inputs.device_cache_rows()};
  }
  projection = with_input(input, norm, layer.qkv, projection);
  kernels::DeviceAttentionArgs attention = attention_over(pages, row_width, step);
  if (rotated_apart || spec_.qk_norm || appended_apart) {
    multiply("QKV projection", projection);
    launch("append to the KV cache", m, qkv_width(), 0, [&] {
      gpu::append_kv({.qkv = workspace_.qkv,
                      .token_stride = row_width,
                      .num_tokens = m,
                      .num_heads = q_heads(),
                      .num_kv_heads = kv_heads(),
                      .head_dim = spec_.head_dim,
                      .query_norm = layer.query_norm,
                      .key_norm = layer.key_norm,
                      .rotary = rotated_apart ? rotary : kernels::DeviceRotary{},
                      .pages = pages,
                      .cache_rows = step.inputs.device_cache_rows(),
                      .dtype = dtype_},
                     stream_);
    });
  } else {
    kernels::DeviceAttentionArgs all = attention;  // where there is no cache
    all.sequences = step.inputs.sequences();
    all.num_sequences += step.num_decoding;
    if (gpu::prefers_qkv_attention(projection, all)) {
      const kernels::LinearShape& shape = layer.qkv.weight.shape;
      launch("QKV projection and attention", m, shape.n,
             static_cast<std::int64_t>(gpu::packed_linear_size(shape)),
             [&] { gpu::qkv_attention(projection, all, stream_); });
      return;
    }
    multiply("QKV projection", projection);
  }
  const std::int64_t key_bytes =
      2 * step.num_keys * kv_heads() * spec_.head_dim *
      static_cast<std::int64_t>(size_of(step.cache == nullptr ? dtype_ : pages.dtype));
  const auto compute = [&] {
    launch("attention", m, q_heads() * spec_.head_dim, key_bytes,
           [&] { gpu::attention(attention, stream_); });
  };
  if (step.num_longer > 0) {
    compute();
  }
  if (step.num_decoding > 0) {
    attention.sequences = step.inputs.sequences();
    attention.num_sequences = step.num_decoding;
    attention.max_tokens = 1;
    compute();
  }
}

/// Attention of the sequences of more than one token.
kernels::DeviceAttentionArgs CudaTransformer::attention_over(const kernels::DevicePages& pages,
                                                             std::int64_t row_width,
                                                             const Step& step) const {
  const std::int64_t dim = spec_.head_dim;
  const auto element = static_cast<std::int64_t>(size_of(dtype_));
  auto* const q = static_cast<const char*>(workspace_.qkv);
  kernels::DeviceAttentionArgs args{.query = q,
                                    .query_stride = row_width,
                                    .pages = pages,
                                    .packed_keys = q + q_heads() * dim * element,
                                    .packed_values = q + (q_heads() + kv_heads()) * dim * element,
                                    .packed_stride = row_width,
                                    .sequences = step.inputs.sequences() + step.num_decoding,
                                    .num_sequences = step.num_longer,
                                    .max_tokens = step.max_tokens,
                                    .num_heads = q_heads(),
                                    .num_kv_heads = kv_heads(),
                                    .head_dim = dim,
                                    .causal = spec_.attention == AttentionKind::kCausal,
                                    .scale = 1.0F / std::sqrt(static_cast<float>(dim)),
                                    .alibi_slopes = device_weights_.alibi_slopes,
                                    .output = workspace_.attended,
                                    .output_stride = q_heads() * dim,
                                    .dtype = dtype_,
                                    // The step before, which wrote keys, has ended: begin_step
                                    // waits for it. Sequences: see send().
                                    .past_is_ready = true};
  if (step.cache != nullptr) {
    args.page_table = step.cache->page_table();
    args.page_table_stride = step.cache->page_table_stride();
    args.packed_keys = args.packed_values = nullptr;
  }
  return args;
}

/// inner = activation(up(norm(input))), or activation(gate(norm(input))) * up(norm(input)).
void CudaTransformer::feed_forward(const void* input, const kernels::DeviceNorm& norm,
                                   const DeviceLayer& layer, std::int64_t m) {
  linear("up projection", input, norm, layer.up,
         {.m = m,
          .activation = spec_.activation,
          .output = workspace_.inner,
          .output_stride = weights_.ffn.size(),
          .gated = spec_.gated});
}

void CudaTransformer::add_attended(const DeviceLayer& layer, std::int64_t m) {
  project_and_add("attention output projection", workspace_.attended, layer.attention_out,
                  {.m = m, .spread = true});
}

void CudaTransformer::add_inner(const DeviceLayer& layer, std::int64_t m) {
  project_and_add("down projection", workspace_.inner, layer.down, {.m = m});
}

/// x += input · Wᵀ + b, where each rank has the columns of W that belong to its part of the input.
/// Rank 0 brings x itself and the bias into the sum.
void CudaTransformer::project_and_add(const char* what, const void* input,
                                      const DeviceProjection& projection,
                                      kernels::DeviceLinearArgs args) {
  const bool root = communicator_->rank() == 0;
  DeviceProjection own = projection;
  own.bias = root ? projection.bias : nullptr;
  args.residual = root ? workspace_.x : nullptr;
  args.residual_stride = spec_.hidden_size;
  args.output = workspace_.x;
  args.output_stride = spec_.hidden_size;
  linear(what, input, {}, own, args);
  if (group_) {
    group_->all_reduce_sum(x_);
  }
}

/// A projection of norm(input), whose rows lie one behind the other.
void CudaTransformer::linear(const char* what, const void* input, const kernels::DeviceNorm& norm,
                             const DeviceProjection& projection,
                             const kernels::DeviceLinearArgs& args) {
  multiply(what, with_input(input, norm, projection, args));
}

void CudaTransformer::multiply(const char* what, const kernels::DeviceLinearArgs& args) {
  const kernels::LinearShape& shape = args.weight.shape;
  launch(what, args.m, shape.n, static_cast<std::int64_t>(gpu::packed_linear_size(shape)),
         [&] { gpu::linear(args, stream_); });
}

/// The arguments of a projection of norm(input). Where its kernel doesn't normalise or round the
/// input, that has been launched.
kernels::DeviceLinearArgs CudaTransformer::with_input(const void* input,
                                                      const kernels::DeviceNorm& norm,
                                                      const DeviceProjection& projection,
                                                      kernels::DeviceLinearArgs args) {
  const kernels::LinearShape& shape = projection.weight.shape;
  const kernels::InputMode mode = projection.input.mode;
  const bool rounds = mode != kernels::InputMode::kFloat32;
  args.weight = projection.weight;
  args.bias = projection.bias;
  args.dtype = dtype_;
  args.weight_is_ready = true;
  args.in_chain = true;
  const bool norm_apart = norm.kind != kernels::NormKind::kNone && !gpu::linear_prefers_norm(args);
  if (rounds || norm_apart) {
    kernels::DeviceNormArgs prepared{.input = input,
                                     .input_stride = shape.k,
                                     .norm = norm,
                                     .weight_is_ready = true,
                                     .output = workspace_.normed,
                                     .output_stride = shape.k,
                                     .num_tokens = args.m,
                                     .hidden_size = shape.k,
                                     .dtype = dtype_};
    if (rounds) {
      prepared.output = workspace_.codes;
      prepared.rounding = projection.input;
      prepared.row_scales = workspace_.row_scales;
      if (is_dynamic(mode) && projection.splits_input && group_) {
        prepared.given_extents = shared_extents(prepared);
      }
    }
    if (shape.k > 0) {  // a rank may have no part of the input
      launch("norm", args.m, shape.k, 0, [&] { gpu::norm(prepared, stream_); });
      args.row_scales = prepared.row_scales;
    }
    input = prepared.output;
  } else {
    args.norm = norm;
  }
  args.input = input;
  args.input_stride = shape.k;
  if (projection.next.data != nullptr) {
    args.next_weight = projection.next.data;
    args.next_bytes = static_cast<std::int64_t>(gpu::packed_linear_size(projection.next.shape));
  }
  return args;
}

/// Extents of whole rows of which every rank has a part, so that all round them to one grid.
float* CudaTransformer::shared_extents(kernels::DeviceNormArgs args) {
  args.output = nullptr;
  args.row_scales = nullptr;
  args.row_extents = workspace_.row_extents;
  const bool one_number = is_symmetric(grid_mode(args.rounding.mode));
  const std::int64_t size = one_number ? args.num_tokens : 2 * args.num_tokens;
  launch("extents of rows", args.num_tokens, args.hidden_size, 0, [&] {
    if (args.hidden_size > 0) {
      gpu::norm(args, stream_);
    } else {
      MOQ_CUDA_CHECK(cudaMemsetAsync(workspace_.row_extents, 0,
                                     static_cast<std::size_t>(size) * sizeof(float), stream_));
    }
  });
  at::Tensor shared =
      at::from_blob(workspace_.row_extents, {size}, at::TensorOptions(at::kFloat).device(device_));
  group_->all_reduce_max(shared);
  return workspace_.row_extents;
}

void CudaTransformer::normalize(const void* input, const kernels::DeviceNorm& norm, void* output,
                                std::int64_t m, const std::int32_t* rows, bool float32_output) {
  launch("norm", m, spec_.hidden_size, 0, [&] {
    gpu::norm({.input = input,
               .input_stride = spec_.hidden_size,
               .rows = rows,
               .norm = norm,
               .weight_is_ready = true,
               .output = output,
               .float32_output = float32_output,
               .output_stride = spec_.hidden_size,
               .num_tokens = m,
               .hidden_size = spec_.hidden_size,
               .dtype = dtype_},
              stream_);
  });
}

}  // namespace moq::inference::cuda
