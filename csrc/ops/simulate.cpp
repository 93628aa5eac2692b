// moq::simulate: fake_quantize whose width, blend ratio and random step are read on the device, for
// weights that are simulated inside the forward pass; with scales that are learned, too.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "csrc/ops/checks.h"
#include "csrc/ops/quantizer.h"
#include "csrc/ops/simulate_point.h"

namespace moq::ops {
namespace {

using at::Tensor;

constexpr const char* kName = "simulate";

/// The arguments after the tensors.
struct Words {
  std::string_view granularity;
  std::int64_t group_size;
  std::string_view mode;
  std::string_view rounding;
  std::int64_t seed;
  std::int64_t name_hash;
  bool transposed;
  std::optional<at::ScalarType> scale_dtype;
  std::string_view scale_rule;
};

// ---------------------------------------------------------------------------------- implementation

Quantizer checked(const Tensor& weight, const Tensor& num_bits, const std::optional<Tensor>& absmax,
                  const std::optional<Tensor>& blend_ratio, const std::optional<Tensor>& step,
                  const Words& words) {
  Quantizer quantizer = parse_quantizer(kName, kMaxBits, words.granularity, words.group_size,
                                        words.mode, words.rounding, words.seed, 0, words.name_hash,
                                        words.transposed, 0.0, words.scale_dtype, words.scale_rule);
  check_quantizer(kName, weight, quantizer);
  check_tensor(kName, "num_bits", num_bits, at::kInt, weight.device(), {1});
  check_tensor(kName, "blend_ratio", blend_ratio, at::kFloat, weight.device(), {1});
  check_tensor(kName, "step", step, at::kLong, weight.device(), {1});
  if (absmax.has_value()) {
    check_tensor(kName, "absmax", absmax, at::kFloat, weight.device(),
                 {num_scales(weight, quantizer)});
    TORCH_CHECK_VALUE(quantizer.mode == QuantMode::kSymmetric, kName,
                      ": mode must be symmetric where absmax is given, got ", words.mode);
    TORCH_CHECK_VALUE(quantizer.rounding == Rounding::kNearest, kName,
                      ": rounding must be nearest where absmax is given, got ", words.rounding);
    TORCH_CHECK_VALUE(quantizer.scale_rule == ScaleRule::kExtent, kName,
                      ": scale_rule must be absmax where absmax is given, got ", words.scale_rule);
    quantizer.scale_rule = ScaleRule::kGiven;
  }
  return quantizer;
}

Tensor simulate(const Tensor& weight, const Tensor& num_bits, const std::optional<Tensor>& absmax,
                const std::optional<Tensor>& blend_ratio, const std::optional<Tensor>& step,
                std::string_view granularity, std::int64_t group_size, std::string_view mode,
                std::string_view rounding, std::int64_t seed, std::int64_t name_hash,
                bool transposed, std::optional<at::ScalarType> scale_dtype,
                std::string_view scale_rule) {
  const Quantizer quantizer = checked(weight, num_bits, absmax, blend_ratio, step,
                                      {granularity, group_size, mode, rounding, seed, name_hash,
                                       transposed, scale_dtype, scale_rule});
  Tensor output = at::empty_like(weight);
  const Tensor input = stored_like(output, weight);
  const Tensor given = absmax.has_value() ? absmax->contiguous() : Tensor();
  kernels::FakeQuantizeTensor matrix = describe(input, quantizer);
  matrix.output = output.mutable_data_ptr();
  matrix.given_absmax = given.defined() ? given.const_data_ptr<float>() : nullptr;
  run_fake_quantize({.tensors = {&matrix, 1},
                     .num_bits = num_bits.const_data_ptr<std::int32_t>(),
                     .blend_ratio = data_or_null<float>(blend_ratio),
                     .seed = static_cast<std::uint64_t>(seed),
                     .step = data_or_null<std::int64_t>(step)},
                    weight.device());
  return output;
}

Tensor simulate_meta(const Tensor& weight, const Tensor& num_bits,
                     const std::optional<Tensor>& absmax, const std::optional<Tensor>& blend_ratio,
                     const std::optional<Tensor>& step, std::string_view granularity,
                     std::int64_t group_size, std::string_view mode, std::string_view rounding,
                     std::int64_t seed, std::int64_t name_hash, bool transposed,
                     std::optional<at::ScalarType> scale_dtype, std::string_view scale_rule) {
  checked(weight, num_bits, absmax, blend_ratio, step,
          {granularity, group_size, mode, rounding, seed, name_hash, transposed, scale_dtype,
           scale_rule});
  return at::empty_like(weight);
}

// ---------------------------------------------------------------------------------------- autograd

/// That of the identity, or with learned scales moq::simulate_gradient.
class Simulate : public torch::autograd::Function<Simulate> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& weight,
                        const Tensor& num_bits, const std::optional<Tensor>& absmax,
                        const std::optional<Tensor>& blend_ratio, const std::optional<Tensor>& step,
                        std::string_view granularity, std::int64_t group_size,
                        std::string_view mode, std::string_view rounding, std::int64_t seed,
                        std::int64_t name_hash, bool transposed,
                        std::optional<at::ScalarType> scale_dtype, std::string_view scale_rule) {
    static const auto op = find_operator<decltype(simulate)>("moq::simulate");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (absmax.has_value()) {
      save_point(context, weight, num_bits, *absmax, blend_ratio, granularity, group_size,
                 transposed, scale_dtype);
    }
    return op.call(weight, num_bits, absmax, blend_ratio, step, granularity, group_size, mode,
                   rounding, seed, name_hash, transposed, scale_dtype, scale_rule);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    constexpr std::size_t kArguments = 14;
    torch::autograd::variable_list result(kArguments);
    result[0] = gradients[0];
    if (context->saved_data.empty()) {
      return result;
    }
    static const auto op = find_operator<std::tuple<Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
        std::string_view, std::int64_t, bool, std::optional<at::ScalarType>)>(
        "moq::simulate_gradient");
    std::tie(result[0], result[2]) = with_saved_point(
        context, [&](const auto&... point) { return op.call(gradients[0], point...); });
    return result;
  }
};

Tensor simulate_autograd(const Tensor& weight, const Tensor& num_bits,
                         const std::optional<Tensor>& absmax,
                         const std::optional<Tensor>& blend_ratio,
                         const std::optional<Tensor>& step, std::string_view granularity,
                         std::int64_t group_size, std::string_view mode, std::string_view rounding,
                         std::int64_t seed, std::int64_t name_hash, bool transposed,
                         std::optional<at::ScalarType> scale_dtype, std::string_view scale_rule) {
  return Simulate::apply(weight, num_bits, absmax, blend_ratio, step, granularity, group_size, mode,
                         rounding, seed, name_hash, transposed, scale_dtype, scale_rule);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, simulate);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, simulate);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, simulate_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, simulate_autograd);
}

}  // namespace moq::ops
