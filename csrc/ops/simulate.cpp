// moq::simulate: fake_quantize whose width, blend ratio and random step are read on the device, for
// weights that are simulated inside the forward pass; with scales that are learned, too.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/quantizer.h"
#include "kernels/common/fake_quantize_layout.h"

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

/// Elements of the scales of a checked weight.
c10::SymInt num_scales(const Tensor& weight, const Quantizer& quantizer) {
  c10::SymInt product = 1;
  for (const c10::SymInt& size : scale_sizes(weight, quantizer)) {
    product *= size;
  }
  return product;
}

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

/// The gradient of a surrogate in which rounding adds a constant. Where no absmax is given: that of
/// the identity. Where it is: with s = |absmax| / qmax and v = weight / s,
///
///   |rint(v)| <= qmax   output = weight + s * (rint(v) - v)   d weight = 1, d s = rint(v) - v
///   beyond              output = sign(v) * qmax * s            d weight = 0, d s = sign(v) * qmax
///
/// as in Esser et al., "Learned step size quantization", ICLR 2020, but for absmax = qmax * s,
/// which keeps its meaning when the width falls, and without their factor. All of it is scaled by
/// what a blend leaves to the grid. Made of differentiable operators; both are constant where they
/// are differentiable again.
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
      torch::autograd::variable_list saved{weight, num_bits, *absmax};
      if (blend_ratio.has_value()) {
        saved.push_back(*blend_ratio);
      }
      context->save_for_backward(saved);
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
    const Tensor& gradient = gradients[0];
    result[0] = gradient;
    const torch::autograd::variable_list saved = context->get_saved_variables();
    if (saved.empty()) {
      return result;
    }
    if (saved[2].sym_numel() == 0) {
      result[2] = at::zeros_like(saved[2]);  // no scale, no weight
      return result;
    }
    const bool transposed = context->saved_data["transposed"].toBool();
    const auto scale_dtype =
        static_cast<at::ScalarType>(context->saved_data["scale_dtype"].toInt());
    const Tensor absmax = saved[2].detach();
    // Every group is a run of the row-major matrix.
    const auto grouped = [&](const Tensor& matrix) {
      return (transposed ? matrix.t() : matrix).reshape_symint({absmax.sym_size(0), -1});
    };
    const auto as_weight = [&](const Tensor& groups) {
      const Tensor& weight = saved[0];
      if (!transposed) {
        return groups.reshape_symint(weight.sym_sizes());
      }
      return groups.reshape_symint({weight.sym_size(1), weight.sym_size(0)}).t();
    };
    // In float32: of integers pow would make the process's default dtype, in which 2^b - 1 may
    // round.
    const Tensor qmax = at::pow(2.0, saved[1].sub(1).to(at::kFloat)).sub(1);
    const double least = min_scale(dtype_of(scale_dtype));
    const double most = max_scale(dtype_of(scale_dtype));
    const Tensor scale =
        absmax.abs().div(qmax).to(scale_dtype).to(at::kFloat).clamp(least, most).unsqueeze(1);
    const Tensor position = grouped(saved[0].detach()).to(at::kFloat).mul(scale.reciprocal());
    const Tensor rounded = position.round();
    const Tensor inside = rounded.abs().le(qmax);
    const Tensor slope = at::where(inside, rounded.sub(position), position.sign().mul(qmax));
    const Tensor incoming = grouped(gradient).to(at::kFloat);
    Tensor to_weight = incoming.mul(inside);
    Tensor to_absmax = incoming.mul(slope).sum(1).div(qmax);
    if (saved.size() > 3) {
      const Tensor grid_share = saved[3].neg().add(1);
      to_weight = incoming.mul(saved[3]).add(to_weight.mul(grid_share));
      to_absmax = to_absmax.mul(grid_share);
    }
    result[0] = as_weight(to_weight).to(gradient.scalar_type());
    result[2] = to_absmax.mul(at::where(absmax.lt(0), -1.0, 1.0));
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
