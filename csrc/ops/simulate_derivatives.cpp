// moq::simulate_gradient and moq::simulate_tangent: the derivatives of moq::simulate with learned
// scales. Both are linear in what they derive, and each is the other's adjoint: any order of
// differentiation calls one or the other. They are constant in weight and scales.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/quantizer.h"
#include "csrc/ops/simulate_point.h"
#include "kernels/learned_scale.h"

namespace moq::ops {
namespace {

using at::Tensor;
using Gradients = std::tuple<Tensor, Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kGradientName = "simulate_gradient";
constexpr const char* kTangentName = "simulate_tangent";

/// Where a derivative is taken: the schemas' arguments from `weight` on.
struct Point {
  const char* where;
  Tensor weight;
  Tensor num_bits;
  Tensor absmax;
  std::optional<Tensor> blend_ratio;
  Quantizer quantizer;
};

Point checked_point(const char* where, const Tensor& weight, const Tensor& num_bits,
                    const Tensor& absmax, const std::optional<Tensor>& blend_ratio,
                    std::string_view granularity, std::int64_t group_size, bool transposed,
                    std::optional<at::ScalarType> scale_dtype) {
  Quantizer quantizer = parse_quantizer(where, kMaxBits, granularity, group_size, "symmetric",
                                        "nearest", 0, 0, 0, transposed, 0.0, scale_dtype, "absmax");
  check_quantizer(where, weight, quantizer);
  check_tensor(where, "num_bits", num_bits, at::kInt, weight.device(), {1});
  check_tensor(where, "blend_ratio", blend_ratio, at::kFloat, weight.device(), {1});
  check_tensor(where, "absmax", absmax, at::kFloat, weight.device(),
               {num_scales(weight, quantizer)});
  quantizer.scale_rule = ScaleRule::kGiven;
  return {where, weight, num_bits, absmax, blend_ratio, quantizer};
}

/// Refuses what has not the weight's sizes and dtype.
void check_like_weight(const Point& point, const char* what, const Tensor& tensor) {
  check_tensor(point.where, what, tensor, point.weight.scalar_type(), point.weight.device(),
               {point.weight.sym_size(0), point.weight.sym_size(1)});
}

/// The kernel's view of a point; the tensors hold what it points to.
struct KernelPoint {
  Tensor weight;
  Tensor absmax;
  kernels::LearnedScale point;

  KernelPoint(const Point& from, const Tensor& result)
      : weight(stored_like(result, from.weight)), absmax(from.absmax.contiguous()) {
    point.matrix = describe(weight, from.quantizer);
    point.matrix.given_absmax = absmax.const_data_ptr<float>();
    point.num_bits = from.num_bits.const_data_ptr<std::int32_t>();
    point.blend_ratio = data_or_null<float>(from.blend_ratio);
  }
};

// ---------------------------------------------------------------------------------- implementation

Gradients empty_gradients(const Point& point) {
  return {at::empty_like(point.weight), at::empty_like(point.absmax, at::MemoryFormat::Contiguous)};
}

Gradients simulate_gradient(const Tensor& gradient, const Tensor& weight, const Tensor& num_bits,
                            const Tensor& absmax, const std::optional<Tensor>& blend_ratio,
                            std::string_view granularity, std::int64_t group_size, bool transposed,
                            std::optional<at::ScalarType> scale_dtype) {
  const Point point = checked_point(kGradientName, weight, num_bits, absmax, blend_ratio,
                                    granularity, group_size, transposed, scale_dtype);
  check_like_weight(point, "gradient", gradient);
  Gradients result = empty_gradients(point);
  const KernelPoint described(point, std::get<0>(result));
  const Tensor of_output = stored_like(std::get<0>(result), gradient);
  kernels::LearnedScaleGradientArgs args{
      .point = described.point,
      .grad_output = of_output.const_data_ptr(),
      .grad_weight = std::get<0>(result).mutable_data_ptr(),
      .grad_absmax = std::get<1>(result).mutable_data_ptr<float>()};
  run_on(
      kGradientName, weight.device(), [&] { kernels::cpu::learned_scale_gradient(args); },
      [&](auto stream) {
        const auto bytes = static_cast<std::int64_t>(
            kernels::cuda::learned_scale_workspace_size(described.point.matrix));
        // The caching allocator hands the block out again only in the order of this stream.
        const Tensor workspace =
            at::empty({bytes}, at::TensorOptions(weight.device()).dtype(at::kByte));
        args.workspace = workspace.mutable_data_ptr();
        kernels::cuda::learned_scale_gradient(args, stream);
      });
  return result;
}

Gradients simulate_gradient_meta(const Tensor& gradient, const Tensor& weight,
                                 const Tensor& num_bits, const Tensor& absmax,
                                 const std::optional<Tensor>& blend_ratio,
                                 std::string_view granularity, std::int64_t group_size,
                                 bool transposed, std::optional<at::ScalarType> scale_dtype) {
  const Point point = checked_point(kGradientName, weight, num_bits, absmax, blend_ratio,
                                    granularity, group_size, transposed, scale_dtype);
  check_like_weight(point, "gradient", gradient);
  return empty_gradients(point);
}

Tensor simulate_tangent(const Tensor& weight_tangent, const Tensor& absmax_tangent,
                        const Tensor& weight, const Tensor& num_bits, const Tensor& absmax,
                        const std::optional<Tensor>& blend_ratio, std::string_view granularity,
                        std::int64_t group_size, bool transposed,
                        std::optional<at::ScalarType> scale_dtype) {
  const Point point = checked_point(kTangentName, weight, num_bits, absmax, blend_ratio,
                                    granularity, group_size, transposed, scale_dtype);
  check_like_weight(point, "weight_tangent", weight_tangent);
  check_tensor(kTangentName, "absmax_tangent", absmax_tangent, at::kFloat, weight.device(),
               {absmax.sym_size(0)});
  Tensor result = at::empty_like(weight);
  const KernelPoint described(point, result);
  const Tensor of_weight = stored_like(result, weight_tangent);
  const Tensor of_absmax = absmax_tangent.contiguous();
  const kernels::LearnedScaleTangentArgs args{.point = described.point,
                                              .weight_tangent = of_weight.const_data_ptr(),
                                              .absmax_tangent = of_absmax.const_data_ptr<float>(),
                                              .output_tangent = result.mutable_data_ptr()};
  run_on(
      kTangentName, weight.device(), [&] { kernels::cpu::learned_scale_tangent(args); },
      [&](auto stream) { kernels::cuda::learned_scale_tangent(args, stream); });
  return result;
}

Tensor simulate_tangent_meta(const Tensor& weight_tangent, const Tensor& absmax_tangent,
                             const Tensor& weight, const Tensor& num_bits, const Tensor& absmax,
                             const std::optional<Tensor>& blend_ratio, std::string_view granularity,
                             std::int64_t group_size, bool transposed,
                             std::optional<at::ScalarType> scale_dtype) {
  const Point point = checked_point(kTangentName, weight, num_bits, absmax, blend_ratio,
                                    granularity, group_size, transposed, scale_dtype);
  check_like_weight(point, "weight_tangent", weight_tangent);
  check_tensor(kTangentName, "absmax_tangent", absmax_tangent, at::kFloat, weight.device(),
               {absmax.sym_size(0)});
  return at::empty_like(weight);
}

// ---------------------------------------------------------------------------------------- autograd

class SimulateGradient : public torch::autograd::Function<SimulateGradient> {
 public:
  template <typename... Rest>
  static variable_list forward(AutogradContext* context, const Tensor& gradient,
                               const Rest&... rest) {
    static const auto op = find_operator<decltype(simulate_gradient)>("moq::simulate_gradient");
    save_point(context, rest...);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [weight, absmax] = op.call(gradient, rest...);
    return {weight, absmax};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    static const auto op = find_operator<decltype(simulate_tangent)>("moq::simulate_tangent");
    constexpr std::size_t kArguments = 9;
    variable_list result(kArguments);
    result[0] = with_saved_point(
        context, [&](const auto&... rest) { return op.call(gradients[0], gradients[1], rest...); });
    return result;
  }
};

class SimulateTangent : public torch::autograd::Function<SimulateTangent> {
 public:
  template <typename... Rest>
  static Tensor forward(AutogradContext* context, const Tensor& weight_tangent,
                        const Tensor& absmax_tangent, const Rest&... rest) {
    static const auto op = find_operator<decltype(simulate_tangent)>("moq::simulate_tangent");
    save_point(context, rest...);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(weight_tangent, absmax_tangent, rest...);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    static const auto op = find_operator<decltype(simulate_gradient)>("moq::simulate_gradient");
    constexpr std::size_t kArguments = 10;
    variable_list result(kArguments);
    std::tie(result[0], result[1]) = with_saved_point(
        context, [&](const auto&... rest) { return op.call(gradients[0], rest...); });
    return result;
  }
};

Gradients simulate_gradient_autograd(const Tensor& gradient, const Tensor& weight,
                                     const Tensor& num_bits, const Tensor& absmax,
                                     const std::optional<Tensor>& blend_ratio,
                                     std::string_view granularity, std::int64_t group_size,
                                     bool transposed, std::optional<at::ScalarType> scale_dtype) {
  const variable_list result =
      SimulateGradient::apply(gradient, weight, num_bits, absmax, blend_ratio, granularity,
                              group_size, transposed, scale_dtype);
  return {result[0], result[1]};
}

Tensor simulate_tangent_autograd(const Tensor& weight_tangent, const Tensor& absmax_tangent,
                                 const Tensor& weight, const Tensor& num_bits, const Tensor& absmax,
                                 const std::optional<Tensor>& blend_ratio,
                                 std::string_view granularity, std::int64_t group_size,
                                 bool transposed, std::optional<at::ScalarType> scale_dtype) {
  return SimulateTangent::apply(weight_tangent, absmax_tangent, weight, num_bits, absmax,
                                blend_ratio, granularity, group_size, transposed, scale_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kGradientName, simulate_gradient);
  m.impl(kTangentName, simulate_tangent);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kGradientName, simulate_gradient);
  m.impl(kTangentName, simulate_tangent);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kGradientName, simulate_gradient_meta);
  m.impl(kTangentName, simulate_tangent_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kGradientName, simulate_gradient_autograd);
  m.impl(kTangentName, simulate_tangent_autograd);
}

}  // namespace moq::ops
