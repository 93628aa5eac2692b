#include "csrc/ops/linear_call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/packed_weight.h"
#include "csrc/ops/quantizer.h"
#include "kernels/activation.h"
#include "kernels/norm.h"

namespace moq::ops {

using at::Tensor;
using kernels::InputMode;
using kernels::LinearShape;
using kernels::NormKind;

// ------------------------------------------------------------------------------------------ checks

LinearShape shape_of_weight(const char* where, const Tensor& input, std::int64_t out_features,
                            std::string_view format, std::optional<std::int64_t> group_size,
                            bool asymmetric) {
  check_activations(where, "input", input);
  TORCH_CHECK_VALUE(input.dim() == 2, where, ": input must be [m, k], got ", input.dim(),
                    " dimensions");
  const std::int64_t k = known_size(input, 1);
  return {.n = out_features,
          .k = k,
          .format = parse_format(where, format),
          .group_size = group_size.value_or(k),
          .asymmetric = asymmetric};
}

namespace {

void check_norm(const LinearCall& call) {
  const SymSizes<1> columns{call.shape.k};
  const at::Device device = call.input.device();
  TORCH_CHECK_VALUE(call.shape.k > 0, call.where, ": input must have columns to normalise, got ",
                    call.input.sym_sizes());
  TORCH_CHECK_VALUE(call.norm_weight.has_value(), call.where,
                    ": norm_weight must come with a norm");
  check_tensor(call.where, "norm_weight", call.norm_weight, at::kFloat, device, columns);
  TORCH_CHECK_VALUE(call.norm == NormKind::kLayerNorm || !call.norm_bias.has_value(), call.where,
                    ": norm_bias must not come with rms_norm, got one");
  check_tensor(call.where, "norm_bias", call.norm_bias, at::kFloat, device, columns);
}

void check_static_grid(const LinearCall& call) {
  const char* mode = name_of(call.input_mode);
  const double scale = call.input_scale.value_or(0.0);
  const std::int64_t zero_point = call.input_zero_point.value_or(0);
  const bool asymmetric = call.input_mode == InputMode::kStaticAsymmetricInt8;
  TORCH_CHECK_VALUE(is_static(call.input_mode) || !call.input_scale.has_value(), call.where,
                    ": input_scale must come with static_int8 or static_asymmetric_int8, got ",
                    scale, " with ", mode);
  TORCH_CHECK_VALUE(
      !is_static(call.input_mode) || exists(grid_of_scale(static_cast<float>(scale), 8)),
      call.where, ": input_scale must be finite and >= ", min_scale(DType::kFloat32), " for ", mode,
      ", got ", scale);
  TORCH_CHECK_VALUE(asymmetric == call.input_zero_point.has_value(), call.where,
                    ": input_zero_point must come with static_asymmetric_int8, and only then, got ",
                    asymmetric ? "none" : "one", " with ", mode);
  TORCH_CHECK_VALUE(zero_point >= -128 && zero_point <= 127, call.where,
                    ": input_zero_point must lie in [-128, 127], got ", zero_point);
}

kernels::InputRounding rounding_of(const LinearCall& call) {
  return {.mode = call.input_mode,
          .scale = static_cast<float>(call.input_scale.value_or(0.0)),
          .zero_point = static_cast<std::int32_t>(call.input_zero_point.value_or(0))};
}

}  // namespace

void check(const LinearCall& call) {
  const at::Device device = call.input.device();
  const at::ScalarType type = call.input.scalar_type();
  check_packed(call.where, call.packed, call.shape, device);
  check_tensor(call.where, "bias", call.bias, type, device, SymSizes<1>{call.shape.n});
  check_tensor(call.where, "residual", call.residual, type, device,
               SymSizes<2>{call.input.sym_size(0), call.shape.n});
  TORCH_CHECK_VALUE(!call.gated || call.shape.n % 2 == 0, call.where,
                    ": out_features must be even to be gated, got ", call.shape.n);
  TORCH_CHECK_VALUE(!call.gated || !call.residual.has_value(), call.where,
                    ": residual must not come with gated, got both");
  const at::ScalarType output = call.dtype.value_or(type);
  TORCH_CHECK_TYPE(output == type || output == at::kFloat, call.where,
                   ": dtype must be float32 or the input's ", name_of(type), ", got ",
                   name_of(output));
  TORCH_CHECK_VALUE(output == type || !call.residual.has_value(), call.where,
                    ": residual must not come with another dtype than the input's, got ",
                    name_of(output));
  TORCH_CHECK_VALUE(
      call.input_mode == InputMode::kFloat32 || kernels::is_integer(call.shape.format), call.where,
      ": input_mode must be float32 with a float weight, got an INT8 mode and ",
      kernels::name_of(call.shape.format));
  check_static_grid(call);
  if (call.norm != NormKind::kNone) {
    check_norm(call);
  }
}

Tensor empty_output(const LinearCall& call) {
  return at::empty_symint(
      {call.input.sym_size(0), call.gated ? call.shape.n / 2 : call.shape.n},
      call.input.options().dtype(call.dtype.value_or(call.input.scalar_type())));
}

// -------------------------------------------------------------------------------------------- CPU

namespace {

Tensor normalised_on_cpu(const LinearCall& call) {
  Tensor rows = call.input.contiguous();
  if (call.norm == NormKind::kNone) {
    return rows;
  }
  Tensor output = at::empty_like(rows);
  normalise_on_cpu(call.norm, rows, call.norm_weight->contiguous(), contiguous(call.norm_bias),
                   call.epsilon, output);
  return output;
}

}  // namespace

void run_on_cpu(const LinearCall& call, const Tensor& output) {
  const Tensor rows = normalised_on_cpu(call);
  const std::optional<Tensor> bias = contiguous(call.bias);
  const std::optional<Tensor> residual = contiguous(call.residual);
  const std::int64_t n = call.shape.n;
  const Tensor product = call.gated ? at::empty({rows.size(0), n}, rows.options()) : output;
  kernels::cpu::linear({.input = rows.const_data_ptr<float>(),
                        .m = rows.size(0),
                        .input_stride = call.shape.k,
                        .weight = {.shape = call.shape, .data = call.packed.const_data_ptr()},
                        .bias = data_or_null<float>(bias),
                        .activation = call.gated ? kernels::Activation::kNone : call.activation,
                        .residual = data_or_null<float>(residual),
                        .residual_stride = n,
                        .input_rounding = rounding_of(call),
                        .output = product.mutable_data_ptr<float>(),
                        .output_stride = n});
  if (call.gated) {  // the kernel takes all gates, then all ups
    const Tensor halves = product.view({rows.size(0), n / 2, 2}).transpose(1, 2).contiguous();
    kernels::cpu::gated_activation({.gate_up = halves.const_data_ptr<float>(),
                                    .output = output.mutable_data_ptr<float>(),
                                    .m = rows.size(0),
                                    .n = n / 2,
                                    .activation = call.activation});
  }
}

// -------------------------------------------------------------------------------------------- GPU

#if defined(MOQ_WITH_CUDA)

void run_on_gpu(const LinearCall& call, kernels::DeviceLinearArgs args, CUstream_st* stream) {
  Tensor rows = with_whole_rows(call.input);
  const std::optional<Tensor> bias = contiguous(call.bias);
  const std::optional<Tensor> residual =
      call.residual.has_value() ? std::optional(with_whole_rows(*call.residual)) : std::nullopt;
  const std::optional<Tensor> norm_weight = contiguous(call.norm_weight);
  const std::optional<Tensor> norm_bias = contiguous(call.norm_bias);
  const kernels::DeviceNorm norm{.kind = call.norm,
                                 .weight = data_or_null<float>(norm_weight),
                                 .bias = data_or_null<float>(norm_bias),
                                 .epsilon = static_cast<float>(call.epsilon)};
  const std::int64_t m = rows.size(0);
  args.m = m;
  args.weight = {.shape = call.shape, .data = call.packed.const_data_ptr()};
  args.bias = data_or_null(bias);
  args.activation = call.activation;
  args.residual = data_or_null(residual);
  args.residual_stride = residual.has_value() ? residual->stride(0) : 0;
  args.dtype = dtype_of(rows.scalar_type());
  args.gated = call.gated;
  args.float32_output = call.dtype.value_or(rows.scalar_type()) != rows.scalar_type();
  args.weight_is_ready = call.weight_is_ready;
  Tensor row_scales;
  const bool rounds = call.input_mode != InputMode::kFloat32;
  if (rounds || (call.norm != NormKind::kNone && !kernels::cuda::linear_prefers_norm(args))) {
    Tensor normalised = at::empty({m, call.shape.k}, rows.options());
    if (rounds) {
      row_scales = at::empty({m}, rows.options().dtype(at::kFloat));
      args.row_scales = row_scales.const_data_ptr<float>();
    }
    if (m > 0 && call.shape.k > 0) {
      kernels::cuda::norm({.input = rows.const_data_ptr(),
                           .input_stride = rows.stride(0),
                           .norm = norm,
                           .output = normalised.mutable_data_ptr(),
                           .output_stride = call.shape.k,
                           .rounding = rounding_of(call),
                           .row_scales = rounds ? row_scales.mutable_data_ptr<float>() : nullptr,
                           .num_tokens = m,
                           .hidden_size = call.shape.k,
                           .dtype = dtype_of(rows.scalar_type())},
                          stream);
    }
    rows = normalised;
  } else {
    args.norm = norm;
  }
  args.input = rows.const_data_ptr();
  args.input_stride = rows.stride(0);
  kernels::cuda::linear(args, stream);
}

#endif

}  // namespace moq::ops
