#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

/// The point at which a derivative of moq::simulate is taken, between forward and backward: what
/// the schemas of moq::simulate_gradient and moq::simulate_tangent have from `weight` on.
namespace moq::ops {

inline void save_point(torch::autograd::AutogradContext* context, const at::Tensor& weight,
                       const at::Tensor& num_bits, const at::Tensor& absmax,
                       const std::optional<at::Tensor>& blend_ratio, std::string_view granularity,
                       std::int64_t group_size, bool transposed,
                       std::optional<at::ScalarType> scale_dtype) {
  context->save_for_backward({weight, num_bits, absmax, blend_ratio.value_or(at::Tensor())});
  context->saved_data["granularity"] = std::string(granularity);
  context->saved_data["group_size"] = group_size;
  context->saved_data["transposed"] = transposed;
  context->saved_data["scale_dtype"] =
      static_cast<std::int64_t>(scale_dtype.value_or(weight.scalar_type()));
}

/// Calls body(the arguments of save_point after the context...).
template <typename Body>
auto with_saved_point(torch::autograd::AutogradContext* context, const Body& body) {
  const torch::autograd::variable_list saved = context->get_saved_variables();
  const auto& words = context->saved_data;
  const std::string granularity = words.at("granularity").toStringRef();
  return body(saved[0].detach(), saved[1], saved[2].detach(),
              saved[3].defined() ? std::optional(saved[3]) : std::nullopt, granularity,
              words.at("group_size").toInt(), words.at("transposed").toBool(),
              static_cast<at::ScalarType>(words.at("scale_dtype").toInt()));
}

/// An operator of this extension by its function's type.
template <typename Function>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace moq::ops
