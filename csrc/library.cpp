// Every operator of the extension: the table of contents. Implementations: csrc/ops/, one file per
// family.
#include <torch/library.h>

TORCH_LIBRARY(moq, m) {
  // Weights on the integer grid of kernels/quant_grid.h. A weight is [out_features, in_features],
  // or stored the other way round and `transposed`; group_size counts input features (per_group) or
  // output features (per_rows). mode "symmetric", "asymmetric", "ternary", "binary"; scale_rule
  // "absmax" or "mse" (the clipping with the least squared error).
  // fake_quantize has a straight-through gradient.
  m.def(
      "fake_quantize(Tensor weight, int num_bits, *, str granularity=\"per_channel\", int "
      "group_size=0, str mode=\"symmetric\", str rounding=\"nearest\", int seed=0, int step=0, int "
      "name_hash=0, bool transposed=False, float blend_ratio=0.0, ScalarType? scale_dtype=None, "
      "str scale_rule=\"absmax\") -> "
      "Tensor");
  // The same, with width (int32 [1]), blend ratio (float32 [1]) and random step (int64 [1]) read on
  // the device; for parametrizations. absmax (float32, one number a scale): takes the place of the
  // weights' own, and has a gradient (learned step sizes).
  m.def(
      "simulate(Tensor weight, Tensor num_bits, *, Tensor? absmax=None, Tensor? blend_ratio=None, "
      "Tensor? step=None, str granularity=\"per_channel\", int group_size=0, str "
      "mode=\"symmetric\", str rounding=\"nearest\", int seed=0, int name_hash=0, bool "
      "transposed=False, ScalarType? scale_dtype=None, str scale_rule=\"absmax\") -> Tensor");
  // The derivatives of simulate with learned scales (kernels/learned_scale.h): the gradients of
  // weight and absmax, summed in an order that depends on the weight's shape alone, and the
  // derivative along a direction of both. Each has the other for its gradient.
  m.def(
      "simulate_gradient(Tensor gradient, Tensor weight, Tensor num_bits, Tensor absmax, *, "
      "Tensor? blend_ratio=None, str granularity=\"per_channel\", int group_size=0, bool "
      "transposed=False, ScalarType? scale_dtype=None) -> (Tensor weight, Tensor absmax)");
  m.def(
      "simulate_tangent(Tensor weight_tangent, Tensor absmax_tangent, Tensor weight, Tensor "
      "num_bits, Tensor absmax, *, Tensor? blend_ratio=None, str granularity=\"per_channel\", int "
      "group_size=0, bool transposed=False, ScalarType? scale_dtype=None) -> Tensor");
  // Many weights with one quantizer in one kernel call, into tensors of their shapes and strides.
  // Bit widths (int32, 0 copies) and the random step (int64) are read on the device: a captured
  // CUDA graph follows them. Without a gradient: only under torch.no_grad() may out
  // require one. (quant_mode is the others' mode, a name that torch keeps for itself in operators
  // that write to their arguments.)
  m.def(
      "foreach_fake_quantize(Tensor[] weights, Tensor num_bits, *, "
      "str granularity=\"per_channel\", int group_size=0, str quant_mode=\"symmetric\", "
      "str rounding=\"nearest\", int seed=0, Tensor? step=None, int[] name_hashes=[], "
      "bool transposed=False, ScalarType? scale_dtype=None, str scale_rule=\"absmax\", "
      "Tensor(a!)[] out) -> ()");
  // One step of AdamW for many parameters of one device in one kernel call (kernels/adamw.h):
  // writes parameters, moments (of their parameter's dtype) and steps (float32, one element:
  // completed ones, to which this is added). Gradients have their parameter's dtype, or are float16
  // or bfloat16 beside float32. lr_tensor takes the place of lr; with a found_inf other than 0
  // nothing is written (all float32, one element). Without a gradient: only under torch.no_grad()
  // may parameters require one.
  m.def(
      "foreach_adamw(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, *, float lr, float beta1, float beta2, float "
      "weight_decay, float eps, bool maximize=False, Tensor? lr_tensor=None, Tensor? "
      "grad_scale=None, Tensor? found_inf=None) -> ()");
  // The same grid's integers: codes [out, in] int8 (int16 above 8 bits), scales [1], [out, 1],
  // [out, groups] or [groups of rows, 1], and zero points of the scales' shape, int32.
  m.def(
      "quantize(Tensor weight, int num_bits, *, str granularity=\"per_channel\", int group_size=0, "
      "str mode=\"symmetric\", str rounding=\"nearest\", int seed=0, int step=0, int name_hash=0, "
      "bool transposed=False, ScalarType? scale_dtype=None, str scale_rule=\"absmax\") -> "
      "(Tensor codes, Tensor scales, Tensor zero_points)");
  // scale * (code - zero_point); dtype None: the scales'.
  m.def(
      "dequantize(Tensor codes, Tensor scales, Tensor? zero_points=None, *, bool transposed=False, "
      "ScalarType? dtype=None) -> Tensor");
  // Activations [..., features] as INT8, mode "symmetric" or "asymmetric": one scale and zero point
  // a token, or the given [1] scale, finite and >= 2^-126, with in asymmetric mode the given int32
  // [1] zero point in [-128, 127] (else: an error on the CPU, codes 0 and outputs NaN on CUDA).
  // Zero points (0 when symmetric) have the scales' shape. The fake-quantized form has a
  // straight-through gradient.
  m.def(
      "quantize_activation(Tensor input, Tensor? scale=None, Tensor? zero_point=None, *, str "
      "mode=\"symmetric\") -> (Tensor codes, Tensor scales, Tensor zero_points)");
  m.def(
      "fake_quantize_activation(Tensor input, Tensor? scale=None, Tensor? zero_point=None, *, str "
      "mode=\"symmetric\") -> Tensor");

  // Linear layers, for inference: a backward raises. A packed weight is an opaque byte tensor in
  // the order of the device that it was packed on, which refuses it on another; whoever holds it
  // also holds its out_features, format ("int8", "int4", "int2", "float32", "bfloat16", "float16"),
  // group_size (None: one scale a row) and whether it has zero points. Activations are float32 on
  // the CPU; float16, bfloat16 or float32 on a GPU, where bias and residual have their dtype.
  m.def(
      "pack_linear(Tensor weight, Tensor? scales=None, Tensor? zero_points=None, *, str "
      "format=\"int8\") -> Tensor");
  // activation(input @ weight.T + bias) + residual; or, gated, activation(gate) * up, where rows 2j
  // and 2j + 1 of the weight are gate and up of column j. input_mode "float32" (the input as it
  // is), "dynamic_int8", "dynamic_asymmetric_int8", "static_int8" (with input_scale) or
  // "static_asymmetric_int8" (with input_zero_point too): its rows are multiplied as the codes of
  // quantize_activation. dtype: the output's, the input's or float32. weight_is_ready: no kernel
  // ahead in the stream writes weight, bias or norm: a GPU may read them before those have ended.
  m.def(
      "linear(Tensor input, Tensor packed, int out_features, *, str format=\"int8\", int? "
      "group_size=None, bool asymmetric=False, Tensor? bias=None, str activation=\"none\", bool "
      "gated=False, Tensor? residual=None, str input_mode=\"float32\", float? input_scale=None, "
      "int? input_zero_point=None, ScalarType? dtype=None, bool weight_is_ready=False) -> Tensor");
  // "layer_norm" or "rms_norm" of each row [num_tokens, hidden_size]; weight and bias are float32.
  m.def(
      "norm(Tensor input, Tensor weight, Tensor? bias=None, *, str norm=\"layer_norm\", float "
      "epsilon=1e-5) -> Tensor");
  // linear(norm(input)). One kernel for up to eight rows on a GPU of compute capability 9.0.
  m.def(
      "norm_linear(Tensor input, Tensor norm_weight, Tensor? norm_bias, Tensor packed, int "
      "out_features, *, str norm=\"layer_norm\", float epsilon=1e-5, str format=\"int8\", int? "
      "group_size=None, bool asymmetric=False, Tensor? bias=None, str activation=\"none\", bool "
      "gated=False, Tensor? residual=None, str input_mode=\"float32\", float? input_scale=None, "
      "int? input_zero_point=None, ScalarType? dtype=None, bool weight_is_ready=False) -> Tensor");
  // The projection of q, k and v on a GPU: normalises (norm None: not), multiplies, adds the bias,
  // rotates q and k (positions None: not) and writes k and v to the rows of a cache (cache_rows
  // below 0: nowhere). Returns [m, q | k | v], or [m, q] with a cache. To be rotated, rows 2i and
  // 2i + 1 of a head (i < rotary_dim / 2) must be its dimensions i and i + rotary_dim / 2. Pages
  // are [pages, num_kv_heads, 64, head_dim]; cache row r is token r % 64 of page r / 64.
  m.def(
      "qkv_linear(Tensor input, Tensor packed, *, int num_heads, int num_kv_heads, int head_dim, "
      "str format=\"int8\", int? group_size=None, bool asymmetric=False, Tensor? bias=None, str? "
      "norm=None, Tensor? norm_weight=None, Tensor? norm_bias=None, float epsilon=1e-5, Tensor? "
      "positions=None, Tensor? cos=None, Tensor? sin=None, Tensor(a!)? key_pages=None, "
      "Tensor(b!)? value_pages=None, Tensor? cache_rows=None, bool weight_is_ready=False) -> "
      "Tensor");
  // What qkv_linear does behind the product, for rows [num_tokens, q | k | v] that are there:
  // RMS norms over each head of q and k and the rotation, in place, then k and v to the cache,
  // whose pages may be int8 with scales [pages, num_kv_heads, 64].
  m.def(
      "append_kv(Tensor(a!) qkv, Tensor(b!) key_pages, Tensor(c!) value_pages, Tensor cache_rows, "
      "*, int num_heads, Tensor(d!)? key_scales=None, Tensor(e!)? value_scales=None, Tensor? "
      "query_norm=None, Tensor? key_norm=None, float epsilon=1e-6, Tensor? positions=None, Tensor? "
      "cos=None, Tensor? sin=None) -> ()");
  // Attention of a ragged batch whose rows [num_tokens, q | k | v] are packed. A sequence is an
  // int32 row of `sequences`: its first token, its number of tokens (at most max_tokens), 0, 0.
  // scale None: 1 / sqrt(head_dim). Returns [num_tokens, num_heads, head_dim].
  m.def(
      "attention(Tensor qkv, Tensor sequences, *, int num_heads, int num_kv_heads, int max_tokens, "
      "bool causal=False, float? scale=None, Tensor? alibi_slopes=None) -> Tensor");
  // The same for query [num_tokens, num_heads, head_dim] over a GPU's cache, which holds the new
  // tokens' keys already. A sequence is: its first token among the new ones, its number of new
  // tokens, how many keys it had before, and its row of page_table [slots, pages]. past_is_ready:
  // no kernel that may still run writes the page table, the sequences or keys and values of the
  // past, which are then read while the kernels before this one end.
  m.def(
      "paged_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table, "
      "Tensor sequences, *, int max_tokens, bool causal=True, float? scale=None, Tensor? "
      "key_scales=None, Tensor? value_scales=None, Tensor? alibi_slopes=None, "
      "bool past_is_ready=False) -> Tensor");
  // Bytes a second of one reading of the buffer: what benchmarks compare with. prefetch: the other
  // of two ways to read, of which a caller takes the faster.
  m.def("read_bandwidth(Tensor buffer, *, bool prefetch) -> float");
  // The same on a GPU for others to time: reads the buffer once, whatever kernels ahead still do,
  // and adds the exclusive or of its 8-byte words to exclusive_or [1], int64.
  m.def("read_once(Tensor buffer, Tensor(a!) exclusive_or, *, bool prefetch) -> ()");
  // One token per row of logits [batch, vocabulary], drawn from stream `row` of the seed; history
  // [batch, length] is what the repetition penalty counts. temperature 0: greedy. With
  // probabilities, on the CPU, also the distribution that was drawn from, else [0]. A row with a
  // NaN or an infinity is an error, on a GPU token -1. A backward raises.
  m.def(
      "sample(Tensor logits, Tensor? history=None, *, float temperature=1.0, int top_k=0, "
      "float top_p=1.0, float min_p=0.0, float repetition_penalty=1.0, int seed=0, int step=0, "
      "bool probabilities=False) -> (Tensor tokens, Tensor probabilities)");
}
