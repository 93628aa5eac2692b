// Every operator of the extension: the table of contents. Implementations: csrc/ops/, one file per
// family.
#include <torch/library.h>

TORCH_LIBRARY(moq, m) {
  // Weights on the integer grid of kernels/quant_grid.h. A weight is [out_features, in_features],
  // or stored the other way round and `transposed`; group_size counts input features (per_group).
  // fake_quantize has a straight-through gradient.
  m.def(
      "fake_quantize(Tensor weight, int num_bits, *, str granularity=\"per_channel\", int "
      "group_size=0, str mode=\"symmetric\", str rounding=\"nearest\", int seed=0, int step=0, int "
      "name_hash=0, bool transposed=False, float blend_ratio=0.0, ScalarType? scale_dtype=None) -> "
      "Tensor");
  // Many weights with one quantizer in one kernel call, into tensors of their shapes and strides.
  // Bit widths (int32, 0 copies) and the random step (int64) are read on the device: a captured
  // CUDA graph follows them. Without a gradient: only under torch.no_grad() may out
  // require one. (quant_mode is the others' mode, a name that torch keeps for itself in operators
  // that write to their arguments.)
  m.def(
      "foreach_fake_quantize(Tensor[] weights, Tensor num_bits, *, "
      "str granularity=\"per_channel\", int group_size=0, str quant_mode=\"symmetric\", "
      "str rounding=\"nearest\", int seed=0, Tensor? step=None, int[] name_hashes=[], "
      "bool transposed=False, ScalarType? scale_dtype=None, Tensor(a!)[] out) -> ()");
  // The same grid's integers: codes [out, in] int8 (int16 above 8 bits), scales [1], [out, 1] or
  // [out, groups], and zero points of the scales' shape, int32.
  m.def(
      "quantize(Tensor weight, int num_bits, *, str granularity=\"per_channel\", int group_size=0, "
      "str mode=\"symmetric\", str rounding=\"nearest\", int seed=0, int step=0, int name_hash=0, "
      "bool transposed=False, ScalarType? scale_dtype=None) -> (Tensor codes, Tensor scales, "
      "Tensor "
      "zero_points)");
  // scale * (code - zero_point); dtype None: the scales'.
  m.def(
      "dequantize(Tensor codes, Tensor scales, Tensor? zero_points=None, *, bool transposed=False, "
      "ScalarType? dtype=None) -> Tensor");
  // Activations [..., features] as symmetric INT8: one scale a token, or the given [1] scale,
  // finite and >= 2^-126 (else: an error on the CPU, codes 0 and outputs NaN on CUDA). The
  // fake-quantized form has a straight-through gradient.
  m.def("quantize_activation(Tensor input, Tensor? scale=None) -> (Tensor codes, Tensor scales)");
  m.def("fake_quantize_activation(Tensor input, Tensor? scale=None) -> Tensor");

  // Linear layers on the CPU, for inference: a backward raises. A packed weight is an opaque byte
  // tensor; whoever holds it also holds its out_features, format ("int8", "int4", "int2",
  // "float32", "bfloat16", "float16"), group_size (None: one scale a row) and whether it has zero
  // points.
  m.def(
      "pack_linear(Tensor weight, Tensor? scales=None, Tensor? zero_points=None, *, str "
      "format=\"int8\") -> Tensor");
  // activation(input @ weight.T + bias) + residual; input_mode "float32" (exact), "dynamic_int8",
  // "static_int8".
  m.def(
      "linear(Tensor input, Tensor packed, int out_features, *, str format=\"int8\", int? "
      "group_size=None, "
      "bool asymmetric=False, Tensor? bias=None, str activation=\"none\", Tensor? residual=None, "
      "str input_mode=\"float32\", float? input_scale=None) -> Tensor");
  // Bytes a second of one reading of the buffer: what benchmarks compare with.
  m.def("read_bandwidth(Tensor buffer, *, bool prefetch) -> float");
  // One token per row of logits [batch, vocabulary], drawn from stream `row` of the seed, and the
  // distribution it was drawn from; history [batch, length] is what the repetition penalty counts.
  // temperature 0: greedy. A backward raises.
  m.def(
      "sample(Tensor logits, Tensor? history=None, *, float temperature=1.0, int top_k=0, "
      "float top_p=1.0, float min_p=0.0, float repetition_penalty=1.0, int seed=0, int step=0) "
      "-> (Tensor tokens, Tensor probabilities)");
}
