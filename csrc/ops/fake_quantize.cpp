// moq::fake_quantize: one weight on its integer grid, with a straight-through gradient. The
// training step itself calls the multi-tensor kernel; this is the same computation as an operator.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "csrc/ops/quantizer.h"

namespace moq::ops {
namespace {

using at::Tensor;

constexpr const char* kName = "fake_quantize";

// -----------------------------------------------------------------------------------
// implementation

Tensor fake_quantize(const Tensor& weight, std::int64_t num_bits, std::string_view granularity,
                     std::int64_t group_size, std::string_view mode, std::string_view rounding,
                     std::int64_t seed, std::int64_t step, std::int64_t name_hash, bool transposed,
                     double blend_ratio, std::optional<at::ScalarType> scale_dtype) {
  const Quantizer quantizer{num_bits, granularity, group_size, mode,        rounding,   seed,
                            step,     name_hash,   transposed, blend_ratio, scale_dtype};
  check_quantizer(kName, weight, quantizer);
  Tensor output = at::empty_like(weight);
  // The kernel writes with the strides that it reads with; a weight with gaps or overlaps is
  // packed.
  const Tensor input =
      weight.strides() == output.strides() ? weight : at::empty_like(weight).copy_(weight);
  kernels::FakeQuantizeTensor matrix = describe(input, quantizer);
  matrix.output = output.mutable_data_ptr();
  run_fake_quantize(input, matrix, quantizer);
  return output;
}

Tensor fake_quantize_meta(const Tensor& weight, std::int64_t num_bits, std::string_view granularity,
                          std::int64_t group_size, std::string_view mode, std::string_view rounding,
                          std::int64_t seed, std::int64_t step, std::int64_t name_hash,
                          bool transposed, double blend_ratio,
                          std::optional<at::ScalarType> scale_dtype) {
  check_quantizer(kName, weight,
                  {num_bits, granularity, group_size, mode, rounding, seed, step, name_hash,
                   transposed, blend_ratio, scale_dtype});
  return at::empty_like(weight);
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
    constexpr std::size_t kArguments = 12;
    torch::autograd::variable_list result(kArguments);
    result[0] = gradients[0];
    return result;
  }
};

Tensor fake_quantize_autograd(const Tensor& weight, std::int64_t num_bits,
                              std::string_view granularity, std::int64_t group_size,
                              std::string_view mode, std::string_view rounding, std::int64_t seed,
                              std::int64_t step, std::int64_t name_hash, bool transposed,
                              double blend_ratio, std::optional<at::ScalarType> scale_dtype) {
  return FakeQuantize::apply(weight, num_bits, granularity, group_size, mode, rounding, seed, step,
                             name_hash, transposed, blend_ratio, scale_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, fake_quantize);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, fake_quantize);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, fake_quantize_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, fake_quantize_autograd);
}

}  // namespace moq::ops
