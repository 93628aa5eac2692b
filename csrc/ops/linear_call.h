#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "kernels/linear.h"

struct CUstream_st;

/// A linear layer with what is fused around it, as its operators share it.
namespace moq::ops {

struct LinearCall {
  const char* where;
  at::Tensor input;   ///< [m, k]
  at::Tensor packed;  ///< of pack_linear, on the input's device
  kernels::LinearShape shape;
  std::optional<at::Tensor> bias = std::nullopt;      ///< [n], the input's dtype
  std::optional<at::Tensor> residual = std::nullopt;  ///< [m, n], the input's dtype
  kernels::Activation activation = kernels::Activation::kNone;
  bool gated = false;
  kernels::InputMode input_mode = kernels::InputMode::kFloat32;
  std::optional<double> input_scale = std::nullopt;  ///< of static modes, which need it
  std::optional<std::int64_t> input_zero_point =
      std::nullopt;  ///< of kStaticAsymmetricInt8, likewise
  kernels::NormKind norm = kernels::NormKind::kNone;
  std::optional<at::Tensor> norm_weight = std::nullopt;  ///< [k] float32, with a norm
  std::optional<at::Tensor> norm_bias = std::nullopt;    ///< [k] float32
  double epsilon = 0.0;
  std::optional<at::ScalarType> dtype = std::nullopt;  ///< of the output; none: the input's
  bool weight_is_ready = false;
};

/// The shape of a weight whose columns are those of `input`.
/// @throws ValueError or TypeError (Python's) naming `where`, unless the input is [m, k].
kernels::LinearShape shape_of_weight(const char* where, const at::Tensor& input,
                                     std::int64_t out_features, std::string_view format,
                                     std::optional<std::int64_t> group_size, bool asymmetric);

/// @throws ValueError or TypeError (Python's) naming call.where, for every argument that does not
///         fit the others.
void check(const LinearCall& call);

/// [m, n], or [m, n / 2] if gated: what the operator returns, not yet written.
at::Tensor empty_output(const LinearCall& call);

/// output = norm(input), on the CPU: all contiguous float32 (csrc/ops/norm.cpp).
void normalise_on_cpu(kernels::NormKind kind, const at::Tensor& input, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias, double epsilon,
                      const at::Tensor& output);

/// Writes `output`, on the CPU.
void run_on_cpu(const LinearCall& call, const at::Tensor& output);

/// The same on a GPU. `args` comes with where the output goes; the rest is filled in. Only in
/// builds with CUDA.
void run_on_gpu(const LinearCall& call, kernels::DeviceLinearArgs args, CUstream_st* stream);

}  // namespace moq::ops
