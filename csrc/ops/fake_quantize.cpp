// moq::fake_quantize: one weight on its integer grid, with a straight-through gradient. The
// training step itself calls the multi-tensor kernel; this is the same computation as an operator.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <vector>

#include "csrc/ops/checks.h"
#include "csrc/ops/in_place.h"
#include "csrc/ops/quantizer.h"

namespace moq::ops {
namespace {

using at::Tensor;

constexpr const char* kName = "fake_quantize";

// ---------------------------------------------------------------------------------- implementation

Tensor fake_quantize(const Tensor& weight, std::int64_t num_bits, std::string_view granularity,
                     std::int64_t group_size, std::string_view mode, std::string_view rounding,
                     std::int64_t seed, std::int64_t step, std::int64_t name_hash, bool transposed,
                     double blend_ratio, std::optional<at::ScalarType> scale_dtype,
                     std::string_view scale_rule) {
  const Quantizer quantizer =
      parse_quantizer(kName, num_bits, granularity, group_size, mode, rounding, seed, step,
                      name_hash, transposed, blend_ratio, scale_dtype, scale_rule);
  check_quantizer(kName, weight, quantizer);
  Tensor output = at::empty_like(weight);
  const Tensor input = stored_like(output, weight);
  kernels::FakeQuantizeTensor matrix = describe(input, quantizer);
  matrix.output = output.mutable_data_ptr();
  run_fake_quantize(input, matrix, quantizer);
  return output;
}

Tensor fake_quantize_meta(const Tensor& weight, std::int64_t num_bits, std::string_view granularity,
                          std::int64_t group_size, std::string_view mode, std::string_view rounding,
                          std::int64_t seed, std::int64_t step, std::int64_t name_hash,
                          bool transposed, double blend_ratio,
                          std::optional<at::ScalarType> scale_dtype, std::string_view scale_rule) {
  check_quantizer(
      kName, weight,
      parse_quantizer(kName, num_bits, granularity, group_size, mode, rounding, seed, step,
                      name_hash, transposed, blend_ratio, scale_dtype, scale_rule));
  return at::empty_like(weight);
}

// ------------------------------------------------------------------------------------ many weights

constexpr const char* kForeachName = "foreach_fake_quantize";

void check_foreach(at::TensorList weights, const Tensor& num_bits,
                   const std::optional<Tensor>& step, at::IntArrayRef name_hashes,
                   at::TensorList out, Quantizer quantizer) {
  TORCH_CHECK_VALUE(out.size() == weights.size(), kForeachName,
                    ": out must have one tensor a weight, got ", out.size(), " for ",
                    weights.size());
  TORCH_CHECK_VALUE(name_hashes.empty() || name_hashes.size() == weights.size(), kForeachName,
                    ": name_hashes must have one hash a weight, got ", name_hashes.size(), " for ",
                    weights.size());
  check_type(kForeachName, "num_bits", num_bits, at::kInt);
  TORCH_CHECK_VALUE(num_bits.dim() == 1 && num_bits.sym_size(0) == weights.size(), kForeachName,
                    ": num_bits must have shape [", weights.size(), "], got ",
                    num_bits.sym_sizes());
  if (step.has_value()) {
    check_type(kForeachName, "step", *step, at::kLong);
    TORCH_CHECK_VALUE(step->sym_numel() == 1, kForeachName, ": step must have one element, got ",
                      step->sym_sizes());
  }
  for (std::size_t i = 0; i < weights.size(); ++i) {
    quantizer.name_hash = name_hashes.empty() ? 0 : name_hashes[i];
    check_quantizer(kForeachName, weights[i], quantizer);
    check_float(kForeachName, "out", out[i].scalar_type());
    TORCH_CHECK_VALUE(out[i].sym_sizes() == weights[i].sym_sizes() &&
                          out[i].sym_strides() == weights[i].sym_strides(),
                      kForeachName, ": out must have its weight's shape and strides ",
                      weights[i].sym_sizes(), " and ", weights[i].sym_strides(), ", got ",
                      out[i].sym_sizes(), " and ", out[i].sym_strides());
    for (const Tensor& other : {weights[i], out[i], step.value_or(num_bits)}) {
      TORCH_CHECK_VALUE(other.device() == num_bits.device(), kForeachName,
                        ": all tensors must be on the device of num_bits, ", num_bits.device(),
                        ", got ", other.device());
    }
  }
}

void foreach_fake_quantize(at::TensorList weights, const Tensor& num_bits,
                           std::string_view granularity, std::int64_t group_size,
                           std::string_view mode, std::string_view rounding, std::int64_t seed,
                           const std::optional<Tensor>& step, at::IntArrayRef name_hashes,
                           bool transposed, std::optional<at::ScalarType> scale_dtype,
                           std::string_view scale_rule, at::TensorList out) {
  Quantizer quantizer =
      parse_quantizer(kForeachName, kMaxBits, granularity, group_size, mode, rounding, seed, 0, 0,
                      transposed, 0.0, scale_dtype, scale_rule);
  check_foreach(weights, num_bits, step, name_hashes, out, quantizer);
  std::vector<kernels::FakeQuantizeTensor> matrices;
  matrices.reserve(weights.size());
  for (std::size_t i = 0; i < weights.size(); ++i) {
    quantizer.name_hash = name_hashes.empty() ? 0 : name_hashes[i];
    matrices.push_back(describe(weights[i], quantizer));
    matrices.back().output = out[i].mutable_data_ptr();
    matrices.back().output_dtype = dtype_of(out[i].scalar_type());
  }
  const Tensor widths = num_bits.contiguous();
  run_fake_quantize({.tensors = matrices,
                     .num_bits = widths.const_data_ptr<std::int32_t>(),
                     .seed = static_cast<std::uint64_t>(seed),
                     .step = step.has_value() ? step->const_data_ptr<std::int64_t>() : nullptr},
                    num_bits.device());
}

void foreach_fake_quantize_meta(at::TensorList weights, const Tensor& num_bits,
                                std::string_view granularity, std::int64_t group_size,
                                std::string_view mode, std::string_view rounding, std::int64_t seed,
                                const std::optional<Tensor>& step, at::IntArrayRef name_hashes,
                                bool transposed, std::optional<at::ScalarType> scale_dtype,
                                std::string_view scale_rule, at::TensorList out) {
  check_foreach(weights, num_bits, step, name_hashes, out,
                parse_quantizer(kForeachName, kMaxBits, granularity, group_size, mode, rounding,
                                seed, 0, 0, transposed, 0.0, scale_dtype, scale_rule));
}

// ---------------------------------------------------------------------------------------- autograd

/// Straight-through estimator: d output / d weight is taken to be 1, which is differentiable again.
class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  template <typename... Arguments>
  static Tensor forward(torch::autograd::AutogradContext* /*context*/, const Tensor& weight,
                        const Arguments&... arguments) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("moq::fake_quantize", "")
                               .typed<decltype(fake_quantize)>();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(weight, arguments...);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*context*/,
                                                 const torch::autograd::variable_list& gradients) {
    constexpr std::size_t kArguments = 13;
    torch::autograd::variable_list result(kArguments);
    result[0] = gradients[0];
    return result;
  }
};

Tensor fake_quantize_autograd(const Tensor& weight, std::int64_t num_bits,
                              std::string_view granularity, std::int64_t group_size,
                              std::string_view mode, std::string_view rounding, std::int64_t seed,
                              std::int64_t step, std::int64_t name_hash, bool transposed,
                              double blend_ratio, std::optional<at::ScalarType> scale_dtype,
                              std::string_view scale_rule) {
  return FakeQuantize::apply(weight, num_bits, granularity, group_size, mode, rounding, seed, step,
                             name_hash, transposed, blend_ratio, scale_dtype, scale_rule);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, fake_quantize);
  m.impl(kForeachName, foreach_fake_quantize);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, fake_quantize);
  m.impl(kForeachName, foreach_fake_quantize);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, fake_quantize_meta);
  m.impl(kForeachName, foreach_fake_quantize_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, fake_quantize_autograd);
  m.impl(kForeachName, torch::CppFunction::makeFromBoxedFunction<without_gradient_in_place>());
}

TORCH_LIBRARY_IMPL(moq, ADInplaceOrView, m) {
  m.impl(kForeachName, torch::CppFunction::makeFromBoxedFunction<bump_versions>());
}

}  // namespace moq::ops
