// moq::quantize and moq::dequantize (weights to codes and back), moq::quantize_activation and
// moq::fake_quantize_activation (activations of the INT8 matrix products).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/accumulate.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/ops/quantizer.h"
#include "kernels/common/parallel.h"
#include "kernels/quantize.h"

#if defined(MOQ_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace moq::ops {
namespace {

using at::Tensor;
using kernels::Granularity;

/// Calls the body of a kernel that the tensor's device has: on_cpu(), or on_cuda(stream).
template <typename OnCpu, typename OnCuda>
void run_on_device_of([[maybe_unused]] const Tensor& tensor, const OnCpu& on_cpu,
                      [[maybe_unused]] const OnCuda& on_cuda) {
#if defined(MOQ_WITH_CUDA)
  if (tensor.is_cuda()) {
    const c10::cuda::CUDAGuard guard(tensor.device());
    return on_cuda(c10::cuda::getCurrentCUDAStream().stream());
  }
#endif
  const kernels::ThreadScope threads(at::get_num_threads());
  on_cpu();
}

// ------------------------------------------------------------------------------- weights to codes

using QuantizedWeight = std::tuple<Tensor, Tensor, Tensor>;

/// Shapes and dtypes of what quantize returns.
QuantizedWeight empty_quantized(const Tensor& weight, const Quantizer& quantizer) {
  const Features features = features_of(weight, quantizer.transposed);
  const auto options = weight.options().memory_format(c10::nullopt);
  const c10::SymDimVector groups = scale_sizes(weight, quantizer);
  return {
      at::empty_symint({features.out, features.in},
                       options.dtype(quantizer.num_bits <= 8 ? at::kChar : at::kShort)),
      at::empty_symint(groups, options.dtype(quantizer.scale_dtype.value_or(weight.scalar_type()))),
      at::empty_symint(groups, options.dtype(at::kInt))};
}

QuantizedWeight quantize(const Tensor& weight, std::int64_t num_bits, std::string_view granularity,
                         std::int64_t group_size, std::string_view mode, std::string_view rounding,
                         std::int64_t seed, std::int64_t step, std::int64_t name_hash,
                         bool transposed, std::optional<at::ScalarType> scale_dtype) {
  const Quantizer quantizer =
      parse_quantizer("quantize", num_bits, granularity, group_size, mode, rounding, seed, step,
                      name_hash, transposed, /*blend_ratio=*/0.0, scale_dtype);
  check_quantizer("quantize", weight, quantizer);
  QuantizedWeight result = empty_quantized(weight, quantizer);
  auto& [codes, scales, zero_points] = result;
  kernels::FakeQuantizeTensor matrix = describe(weight, quantizer);
  matrix.codes = codes.mutable_data_ptr();
  matrix.codes_dtype = dtype_of(codes.scalar_type());
  matrix.scales = scales.mutable_data_ptr();
  matrix.zero_points = zero_points.mutable_data_ptr<std::int32_t>();
  run_fake_quantize(weight, matrix, quantizer);
  return result;
}

QuantizedWeight quantize_meta(const Tensor& weight, std::int64_t num_bits,
                              std::string_view granularity, std::int64_t group_size,
                              std::string_view mode, std::string_view rounding, std::int64_t seed,
                              std::int64_t step, std::int64_t name_hash, bool transposed,
                              std::optional<at::ScalarType> scale_dtype) {
  const Quantizer quantizer =
      parse_quantizer("quantize", num_bits, granularity, group_size, mode, rounding, seed, step,
                      name_hash, transposed, /*blend_ratio=*/0.0, scale_dtype);
  check_quantizer("quantize", weight, quantizer);
  return empty_quantized(weight, quantizer);
}

// ------------------------------------------------------------------------------- codes to weights

/// Shapes of the scales tell the granularity: [1], [out, 1] or [out, groups].
void check_dequantize(const Tensor& codes, const Tensor& scales,
                      const std::optional<Tensor>& zero_points,
                      std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_VALUE(codes.dim() == 2,
                    "dequantize: codes must be a matrix [out_features, in_features], got ",
                    codes.dim(), " dimensions");
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kChar || codes.scalar_type() == at::kShort,
                   "dequantize: codes must be int8 or int16, got ", codes.scalar_type());
  check_float("dequantize", "scales", scales.scalar_type());
  check_float("dequantize", "dtype", dtype.value_or(scales.scalar_type()));
  const bool one_scale = scales.dim() == 1 && scales.sym_size(0) == 1;
  const bool rows_of_scales = scales.dim() == 2 && scales.sym_size(0) == codes.sym_size(0) &&
                              scales.sym_size(1) > 0 && codes.sym_size(1) % scales.sym_size(1) == 0;
  TORCH_CHECK_VALUE(one_scale || rows_of_scales,
                    "dequantize: scales must be [1] or [out_features, groups] with groups dividing "
                    "the input features, got ",
                    scales.sym_sizes(), " for codes ", codes.sym_sizes());
  TORCH_CHECK_VALUE(scales.device() == codes.device(), "dequantize: scales must be on ",
                    codes.device(), " as the codes are, got ", scales.device());
  if (zero_points.has_value()) {
    TORCH_CHECK_TYPE(zero_points->scalar_type() == at::kInt,
                     "dequantize: zero_points must be int32, got ", zero_points->scalar_type());
    TORCH_CHECK_VALUE(zero_points->sym_sizes() == scales.sym_sizes(),
                      "dequantize: zero_points must have the scales' shape ", scales.sym_sizes(),
                      ", got ", zero_points->sym_sizes());
    TORCH_CHECK_VALUE(zero_points->device() == codes.device(),
                      "dequantize: zero_points must be on ", codes.device(),
                      " as the codes are, got ", zero_points->device());
  }
}

Tensor empty_dequantized(const Tensor& codes, const Tensor& scales, bool transposed,
                         std::optional<at::ScalarType> dtype) {
  const Features features = features_of(codes, transposed);
  return at::empty_symint({features.out, features.in},
                          codes.options().dtype(dtype.value_or(scales.scalar_type())));
}

Tensor dequantize(const Tensor& codes, const Tensor& scales,
                  const std::optional<Tensor>& zero_points, bool transposed,
                  std::optional<at::ScalarType> dtype) {
  check_dequantize(codes, scales, zero_points, dtype);
  const Tensor output = empty_dequantized(codes, scales, transposed, dtype);
  const Tensor packed_codes = codes.contiguous();
  const Tensor packed_scales = scales.contiguous();
  const Tensor packed_zero_points = zero_points.has_value() ? zero_points->contiguous() : Tensor();
  const bool one_scale = scales.dim() == 1;
  const std::int64_t groups = one_scale ? 1 : scales.size(1);
  const kernels::DequantizeArgs args{
      .codes = packed_codes.const_data_ptr(),
      .scales = packed_scales.const_data_ptr(),
      .zero_points =
          zero_points.has_value() ? packed_zero_points.const_data_ptr<std::int32_t>() : nullptr,
      .output = output.mutable_data_ptr(),
      .rows = codes.size(0),
      .cols = codes.size(1),
      .row_stride = output.stride(transposed ? 1 : 0),
      .col_stride = output.stride(transposed ? 0 : 1),
      .group_size = codes.size(1) / groups,
      .codes_dtype = dtype_of(codes.scalar_type()),
      .scale_dtype = dtype_of(scales.scalar_type()),
      .output_dtype = dtype_of(output.scalar_type()),
      .granularity = one_scale     ? Granularity::kPerTensor
                     : groups == 1 ? Granularity::kPerChannel
                                   : Granularity::kPerGroup};
  run_on_device_of(
      codes, [&] { kernels::cpu::dequantize(args); },
      [&](auto stream) { kernels::cuda::dequantize(args, stream); });
  return output;
}

Tensor dequantize_meta(const Tensor& codes, const Tensor& scales,
                       const std::optional<Tensor>& zero_points, bool transposed,
                       std::optional<at::ScalarType> dtype) {
  check_dequantize(codes, scales, zero_points, dtype);
  return empty_dequantized(codes, scales, transposed, dtype);
}

// ------------------------------------------------------------------------------------- activations

void check_activation(const char* where, const Tensor& input, const std::optional<Tensor>& scale) {
  check_float(where, "input", input.scalar_type());
  TORCH_CHECK_VALUE(input.dim() >= 1, where, ": input must be [..., features], got a scalar");
  if (scale.has_value()) {
    TORCH_CHECK_TYPE(scale->scalar_type() == at::kFloat, where, ": scale must be float32, got ",
                     scale->scalar_type());
    TORCH_CHECK_VALUE(scale->dim() == 1 && scale->sym_size(0) == 1, where,
                      ": scale must have shape [1], got ", scale->sym_sizes());
    TORCH_CHECK_VALUE(scale->device() == input.device(), where, ": scale must be on ",
                      input.device(), " as the input is, got ", scale->device());
  }
}

/// One row per token: the input as a matrix over its last dimension, made contiguous.
kernels::QuantizeActivationArgs describe_activation(const Tensor& contiguous,
                                                    const std::optional<Tensor>& scale) {
  const std::int64_t cols = contiguous.size(-1);
  return {.input = contiguous.const_data_ptr(),
          .static_scale = scale.has_value() ? scale->const_data_ptr<float>() : nullptr,
          .rows = c10::multiply_integers(contiguous.sizes().slice(0, contiguous.dim() - 1)),
          .cols = cols,
          .row_stride = cols,
          .input_dtype = dtype_of(contiguous.scalar_type())};
}

void run_activation(const Tensor& input, const kernels::QuantizeActivationArgs& args) {
  run_on_device_of(
      input, [&] { kernels::cpu::quantize_activation(args); },
      [&](auto stream) { kernels::cuda::quantize_activation(args, stream); });
}

std::tuple<Tensor, Tensor> empty_quantized_activation(const Tensor& input,
                                                      const std::optional<Tensor>& scale) {
  c10::SymDimVector tokens(input.sym_sizes().begin(), input.sym_sizes().end());
  tokens.back() = 1;
  const Tensor codes = at::empty_symint(input.sym_sizes(), input.options().dtype(at::kChar));
  return {codes, scale.has_value() ? at::empty_like(*scale)
                                   : at::empty_symint(tokens, input.options().dtype(at::kFloat))};
}

std::tuple<Tensor, Tensor> quantize_activation(const Tensor& input,
                                               const std::optional<Tensor>& scale) {
  check_activation("quantize_activation", input, scale);
  const Tensor contiguous = input.contiguous();
  auto result = empty_quantized_activation(input, scale);
  auto& [codes, scales] = result;
  kernels::QuantizeActivationArgs args = describe_activation(contiguous, scale);
  args.codes = codes.mutable_data_ptr<std::int8_t>();
  args.scales = scale.has_value() ? nullptr : scales.mutable_data_ptr<float>();
  run_activation(contiguous, args);
  if (scale.has_value()) {
    scales.copy_(*scale);
  }
  return result;
}

std::tuple<Tensor, Tensor> quantize_activation_meta(const Tensor& input,
                                                    const std::optional<Tensor>& scale) {
  check_activation("quantize_activation", input, scale);
  return empty_quantized_activation(input, scale);
}

Tensor fake_quantize_activation(const Tensor& input, const std::optional<Tensor>& scale) {
  check_activation("fake_quantize_activation", input, scale);
  const Tensor contiguous = input.contiguous();
  const Tensor output = at::empty_like(contiguous);
  kernels::QuantizeActivationArgs args = describe_activation(contiguous, scale);
  args.output = output.mutable_data_ptr();
  run_activation(contiguous, args);
  return output;
}

Tensor fake_quantize_activation_meta(const Tensor& input, const std::optional<Tensor>& scale) {
  check_activation("fake_quantize_activation", input, scale);
  return at::empty_symint(input.sym_sizes(), input.options().memory_format(c10::nullopt));
}

// ---------------------------------------------------------------------------------------- autograd

/// Straight-through estimator: the gradient passes unchanged, but for elements that a given scale
/// clamps, which get 0. The backward is made of differentiable operators.
class FakeQuantizeActivation : public torch::autograd::Function<FakeQuantizeActivation> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& input,
                        const std::optional<Tensor>& scale) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("moq::fake_quantize_activation", "")
                               .typed<decltype(fake_quantize_activation)>();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (scale.has_value()) {
      context->save_for_backward({input, *scale});
    }
    return op.call(input, scale);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    if (saved.empty()) {
      return {gradients[0], Tensor()};
    }
    constexpr double kQMax = 127.0;
    const Tensor positions = saved[0].detach().to(at::kFloat).mul(saved[1].detach().reciprocal());
    return {gradients[0].mul(positions.round().abs().le(kQMax)), Tensor()};
  }
};

Tensor fake_quantize_activation_autograd(const Tensor& input, const std::optional<Tensor>& scale) {
  return FakeQuantizeActivation::apply(input, scale);
}

/// Codes are integers: nothing to differentiate, and their scales are constants.
template <auto* kOperator, typename... Arguments>
auto without_gradient(const char* name, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<std::remove_pointer_t<decltype(kOperator)>>()
      .call(arguments...);
}

QuantizedWeight quantize_autograd(const Tensor& weight, std::int64_t num_bits,
                                  std::string_view granularity, std::int64_t group_size,
                                  std::string_view mode, std::string_view rounding,
                                  std::int64_t seed, std::int64_t step, std::int64_t name_hash,
                                  bool transposed, std::optional<at::ScalarType> scale_dtype) {
  return without_gradient<quantize>("moq::quantize", weight, num_bits, granularity, group_size,
                                    mode, rounding, seed, step, name_hash, transposed, scale_dtype);
}

std::tuple<Tensor, Tensor> quantize_activation_autograd(const Tensor& input,
                                                        const std::optional<Tensor>& scale) {
  return without_gradient<quantize_activation>("moq::quantize_activation", input, scale);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl("quantize", quantize);
  m.impl("dequantize", dequantize);
  m.impl("quantize_activation", quantize_activation);
  m.impl("fake_quantize_activation", fake_quantize_activation);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl("quantize", quantize);
  m.impl("dequantize", dequantize);
  m.impl("quantize_activation", quantize_activation);
  m.impl("fake_quantize_activation", fake_quantize_activation);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl("quantize", quantize_meta);
  m.impl("dequantize", dequantize_meta);
  m.impl("quantize_activation", quantize_activation_meta);
  m.impl("fake_quantize_activation", fake_quantize_activation_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl("quantize", quantize_autograd);
  m.impl("dequantize", torch::autograd::autogradNotImplementedFallback());
  m.impl("quantize_activation", quantize_activation_autograd);
  m.impl("fake_quantize_activation", fake_quantize_activation_autograd);
}

}  // namespace moq::ops
