#include "csrc/ops/checks.h"

#include "csrc/ops/quantizer.h"

namespace moq::ops {

using at::Tensor;
using kernels::Activation;
using kernels::InputMode;
using kernels::NormKind;
using kernels::WeightFormat;

std::string name_of(at::ScalarType type) {
  return c10::getDtypeNames(type).first;
}

std::int64_t known_size(const Tensor& tensor, std::int64_t dim) {
  return tensor.sym_size(dim).guard_int(__FILE__, __LINE__);
}

void check_type(const char* where, const char* what, const Tensor& tensor, at::ScalarType type) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, where, ": ", what, " must be ", name_of(type),
                   ", got ", name_of(tensor.scalar_type()));
}

void check_device(const char* where, const char* what, const Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device, where, ": ", what, " must be on ", device,
                    " as the other arguments are, got ", tensor.device());
}

void check_sizes(const char* where, const char* what, const Tensor& tensor,
                 c10::SymIntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == sizes, where, ": ", what, " must be ", sizes, ", got ",
                    tensor.sym_sizes());
}

void check_contiguous(const char* where, const char* what, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), where, ": ", what, " must be contiguous, got strides ",
                    tensor.sym_strides());
}

void check_tensor(const char* where, const char* what, const Tensor& tensor, at::ScalarType type,
                  at::Device device, c10::SymIntArrayRef sizes) {
  check_type(where, what, tensor, type);
  check_device(where, what, tensor, device);
  check_sizes(where, what, tensor, sizes);
}

void check_tensor(const char* where, const char* what, const std::optional<Tensor>& tensor,
                  at::ScalarType type, at::Device device, c10::SymIntArrayRef sizes) {
  if (tensor.has_value()) {
    check_tensor(where, what, *tensor, type, device, sizes);
  }
}

void check_activations(const char* where, const char* what, const Tensor& tensor) {
  if (tensor.device().is_cpu()) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, where, ": ", what,
                     " must be float32 on the CPU, got ", name_of(tensor.scalar_type()));
  } else {
    check_float(where, what, tensor.scalar_type());
  }
}

WeightFormat parse_format(const char* where, std::string_view name) {
  return parse(where, "format", name,
               std::array{WeightFormat::kInt8, WeightFormat::kInt4, WeightFormat::kInt2,
                          WeightFormat::kFloat32, WeightFormat::kBFloat16, WeightFormat::kFloat16},
               [](WeightFormat format) { return kernels::name_of(format); });
}

Activation parse_activation(const char* where, std::string_view name) {
  return parse(
      where, "activation", name,
      std::array{Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh,
                 Activation::kQuickGelu, Activation::kSilu, Activation::kTanh},
      [](Activation activation) { return kernels::name_of(activation); });
}

InputMode parse_input_mode(const char* where, std::string_view name) {
  return parse(where, "input_mode", name,
               std::array{InputMode::kFloat32, InputMode::kDynamicInt8, InputMode::kStaticInt8,
                          InputMode::kDynamicAsymmetricInt8, InputMode::kStaticAsymmetricInt8},
               [](InputMode mode) { return kernels::name_of(mode); });
}

NormKind parse_norm(const char* where, std::string_view name) {
  return parse(
      where, "norm", name, std::array{NormKind::kLayerNorm, NormKind::kRmsNorm},
      [](NormKind kind) { return kind == NormKind::kLayerNorm ? "layer_norm" : "rms_norm"; });
}

const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(tensor->contiguous()) : std::nullopt;
}

Tensor with_whole_rows(const Tensor& tensor) {
  const bool whole = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  const bool apart = tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1);
  return whole && apart ? tensor : tensor.contiguous();
}

}  // namespace moq::ops
