#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/activation.h"
#include "kernels/linear.h"
#include "kernels/norm.h"

/// What the operators of inference check of their arguments. Each function throws ValueError or
/// TypeError (Python's): "where: argument must …, got …".
namespace moq::ops {

/// "float32", "int8", … as Python has it.
std::string name_of(at::ScalarType type);

/// The same number, which a compiler that traces the operator then takes for granted.
std::int64_t known_size(const at::Tensor& tensor, std::int64_t dim);

template <std::size_t kSize>
using SymSizes = std::array<c10::SymInt, kSize>;

void check_type(const char* where, const char* what, const at::Tensor& tensor, at::ScalarType type);
void check_device(const char* where, const char* what, const at::Tensor& tensor, at::Device device);
void check_sizes(const char* where, const char* what, const at::Tensor& tensor,
                 c10::SymIntArrayRef sizes);
/// A tensor that a kernel writes to, or reads as it lies.
void check_contiguous(const char* where, const char* what, const at::Tensor& tensor);

/// All of type, device and sizes.
void check_tensor(const char* where, const char* what, const at::Tensor& tensor,
                  at::ScalarType type, at::Device device, c10::SymIntArrayRef sizes);
void check_tensor(const char* where, const char* what, const std::optional<at::Tensor>& tensor,
                  at::ScalarType type, at::Device device, c10::SymIntArrayRef sizes);

/// The activations of a GPU are float32, float16 or bfloat16, those of the CPU float32.
void check_activations(const char* where, const char* what, const at::Tensor& tensor);

/// The one of `values` with that name.
template <typename Enum, std::size_t kSize, typename NameOf>
Enum parse(const char* where, const char* what, std::string_view name,
           const std::array<Enum, kSize>& values, const NameOf& name_of) {
  std::string known;
  for (const Enum value : values) {
    if (name == name_of(value)) {
      return value;
    }
    known += known.empty() ? "" : ", ";
    known += name_of(value);
  }
  TORCH_CHECK_VALUE(false, where, ": ", what, " must be one of ", known, ", got ", name);
}

kernels::WeightFormat parse_format(const char* where, std::string_view name);
kernels::Activation parse_activation(const char* where, std::string_view name);
kernels::InputMode parse_input_mode(const char* where, std::string_view name);
/// "layer_norm" or "rms_norm".
kernels::NormKind parse_norm(const char* where, std::string_view name);

/// The data of a tensor that may be missing.
template <typename Element>
const Element* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<Element>() : nullptr;
}
const void* data_or_null(const std::optional<at::Tensor>& tensor);
std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor);

/// Rows of elements that lie side by side: the tensor itself where it has such, else a copy.
at::Tensor with_whole_rows(const at::Tensor& tensor);

}  // namespace moq::ops
