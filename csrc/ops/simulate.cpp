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

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
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
  const Tensor input =
      weight.strides() == output.strides() ? weight : at::empty_like(weight).copy_(weight);
  const Tensor given = absmax.has_value() ? absmax->contiguous() : Tensor();
  kernels::FakeQuantizeTensor matrix = describe(input, quantizer);
  matrix.output = output.mutable_data_ptr();
  matrix.given_absmax = given.defined() ? given.const_data_ptr<float>() : nullptr;
  run_fake_quantize({.tensors = {&matrix, 1},
                     .num_bits = num_bits.const_data_ptr<std::int32_t>(),
                     .blend_ratio = static_cast<const float*>(data_or_null(blend_ratio)),
                     .seed = static_cast<std::uint64_t>(seed),
                     .step = static_cast<const std::int64_t*>(data_or_null(step))},
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
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("moq::simulate", "")
                               .typed<decltype(simulate)>();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (absmax.has_value()) {
      context->save_for_backward({weight, num_bits, *absmax, blend_ratio.value_or(Tensor())});
      context->saved_data["granularity"] = std::string(granularity);
      context->saved_data["group_size"] = group_size;
      context->saved_data["transposed"] = transposed;
      context->saved_data["scale_dtype"] =
          static_cast<std::int64_t>(scale_dtype.value_or(weight.scalar_type()));
    }
    return op.call(weight, num_bits, absmax, blend_ratio, step, granularity, group_size, mode,
                   rounding, seed, name_hash, transposed, scale_dtype, scale_rule);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    constexpr std::size_t kArguments = 14;
    torch::autograd::variable_list result(kArguments);
    result[0] = gradients[0];
    const torch::autograd::variable_list saved = context->get_saved_variables();
    if (saved.empty()) {
      return result;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("moq::simulate_gradient", "")
                               .typed<std::tuple<Tensor, Tensor>(
                                   const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   const std::optional<Tensor>&, std::string_view, std::int64_t,
                                   bool, std::optional<at::ScalarType>)>();
    const auto& words = context->saved_data;
    std::tie(result[0], result[2]) =
        op.call(gradients[0], saved[0].detach(), saved[1], saved[2].detach(),
                saved[3].defined() ? std::optional(saved[3]) : std::nullopt,
                words.at("granularity").toStringRef(), words.at("group_size").toInt(),
                words.at("transposed").toBool(),
                static_cast<at::ScalarType>(words.at("scale_dtype").toInt()));
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
