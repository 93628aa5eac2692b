#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/common/dtype.h"
#include "kernels/fake_quantize.h"

/// What the operators on weights share: one weight's quantizer, and the
/// checks that every dispatch key makes.
namespace moq::ops {

/// How one weight is quantized.
struct Quantizer {
  std::int64_t num_bits;
  kernels::Granularity granularity;
  std::int64_t group_size;  ///< input features per scale (per_group), output features (per_rows)
  QuantMode mode;
  Rounding rounding;
  std::int64_t seed;
  std::int64_t step;
  std::int64_t name_hash;
  bool transposed;  ///< the weight is stored [in_features, out_features]
  double blend_ratio;
  std::optional<at::ScalarType> scale_dtype;  ///< none: the weight's
  ScaleRule scale_rule;
};

/// From the arguments after the weight, in the schema's order.
/// @throws ValueError (Python's) naming `where`, for a name that csrc/grid_names.h does not know.
Quantizer parse_quantizer(const char* where, std::int64_t num_bits, std::string_view granularity,
                          std::int64_t group_size, std::string_view mode, std::string_view rounding,
                          std::int64_t seed, std::int64_t step, std::int64_t name_hash,
                          bool transposed, double blend_ratio,
                          std::optional<at::ScalarType> scale_dtype, std::string_view scale_rule);

/// @throws ValueError or TypeError (Python's) naming `where`, for a weight that is no matrix of
///         float32, float16 or bfloat16, and for each argument out of its range.
void check_quantizer(const char* where, const at::Tensor& weight, const Quantizer& quantizer);

/// Out- and input features of a checked weight, symbolic under tracing.
struct Features {
  c10::SymInt out;
  c10::SymInt in;
};
Features features_of(const at::Tensor& weight, bool transposed);

/// Sizes of the scales of a checked weight: [1], [out, 1], [out, in / group_size] or
/// [out / group_size, 1].
c10::SymDimVector scale_sizes(const at::Tensor& weight, const Quantizer& quantizer);

/// How many those are.
c10::SymInt num_scales(const at::Tensor& weight, const Quantizer& quantizer);

/// The kernel's description of a checked weight, its outputs still null. Strides are the weight's.
kernels::FakeQuantizeTensor describe(const at::Tensor& weight, const Quantizer& quantizer);

/// A matrix in the storage of `result`, which at::empty_like gave: the kernels write with the
/// strides that they read with, and one with gaps or overlaps is packed.
at::Tensor stored_like(const at::Tensor& result, const at::Tensor& matrix);

/// Runs the kernel of `device`, where the pointers of `args` point to, on torch's threads or its
/// current stream; the workspace is made here.
/// @throws NotImplementedError (Python's) for a device without a kernel.
void run_fake_quantize(kernels::FakeQuantizeArgs args, at::Device device);

/// One stage of the kernels' collect_groups, likewise.
void run_collect_groups(const kernels::FakeQuantizeArgs& args, int stage, at::Device device);

/// The same for one described weight, outputs filled in, whose quantizer holds everything.
void run_fake_quantize(const at::Tensor& weight, const kernels::FakeQuantizeTensor& matrix,
                       const Quantizer& quantizer);

/// @throws TypeError naming `where` and `what` unless `type` is float32, float16 or bfloat16.
void check_float(const char* where, const char* what, at::ScalarType type);

/// The kernels' name of a checked type.
DType dtype_of(at::ScalarType type);

}  // namespace moq::ops
