// moq::pack_linear: a weight in the order that the kernels of its device stream it.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"
#include "csrc/ops/packed_weight.h"

namespace moq::ops {

using at::Tensor;
using kernels::LinearShape;
using kernels::WeightFormat;

namespace {

constexpr const char* kName = "pack_linear";
constexpr std::int64_t kLine =
    64;  // bytes: every part of a weight that is packed for a GPU has whole ones

// ------------------------------------------------------------------------------------------ checks

at::ScalarType element_type(WeightFormat format) {
  switch (format) {
    case WeightFormat::kFloat32:
      return at::kFloat;
    case WeightFormat::kBFloat16:
      return at::kBFloat16;
    case WeightFormat::kFloat16:
      return at::kHalf;
    default:
      return at::kChar;
  }
}

/// Shape of the weight that pack_linear's arguments describe.
LinearShape check(const Tensor& weight, const std::optional<Tensor>& scales,
                  const std::optional<Tensor>& zero_points, std::string_view format_name) {
  const WeightFormat format = parse_format(kName, format_name);
  const bool integer = kernels::is_integer(format);
  TORCH_CHECK_VALUE(weight.dim() == 2, kName, ": weight must be a matrix, got ", weight.dim(),
                    " dimensions");
  TORCH_CHECK_TYPE(weight.scalar_type() == element_type(format), kName, ": weight must be ",
                   name_of(element_type(format)), " for format ", format_name, ", got ",
                   name_of(weight.scalar_type()));
  TORCH_CHECK_VALUE(integer == scales.has_value(), kName,
                    ": integer formats need scales and float formats have none, got ", format_name,
                    scales.has_value() ? " with scales" : " without");
  TORCH_CHECK_VALUE(integer || !zero_points.has_value(), kName,
                    ": only integer formats have zero points, got ", format_name);
  LinearShape shape{.n = known_size(weight, 0),
                    .k = known_size(weight, 1),
                    .format = format,
                    .group_size = known_size(weight, 1),
                    .asymmetric = zero_points.has_value()};
  if (integer) {
    check_type(kName, "scales", *scales, at::kFloat);
    check_device(kName, "scales", *scales, weight.device());
    TORCH_CHECK_VALUE(scales->dim() == 2 && known_size(*scales, 0) == shape.n, kName,
                      ": scales must be [", shape.n, ", groups], got ", scales->sym_sizes());
    const std::int64_t groups = known_size(*scales, 1);
    TORCH_CHECK_VALUE(groups > 0 && shape.k % groups == 0, kName,
                      ": the groups of scales must divide the columns, got ", groups, " and ",
                      shape.k);
    shape.group_size = shape.k / groups;
  }
  if (zero_points.has_value()) {
    check_type(kName, "zero_points", *zero_points, at::kInt);
    check_device(kName, "zero_points", *zero_points, weight.device());
    TORCH_CHECK_VALUE(zero_points->sym_sizes() == scales->sym_sizes(), kName,
                      ": zero_points must have the shape of scales, got ", zero_points->sym_sizes(),
                      " and ", scales->sym_sizes());
  }
  return shape;
}

// ---------------------------------------------------------------------------------- implementation

Tensor pack_linear(const Tensor& weight, const std::optional<Tensor>& scales,
                   const std::optional<Tensor>& zero_points, std::string_view format) {
  const LinearShape shape = check(weight, scales, zero_points, format);
  Tensor packed =
      at::empty(packed_sizes(shape, packs_for_gpu(weight)), weight.options().dtype(at::kByte));
  const std::optional<Tensor> whole_scales = contiguous(scales);
  const std::optional<Tensor> whole_zero_points = contiguous(zero_points);
  const kernels::PackLinearArgs args{.shape = shape,
                                     .weight = weight.const_data_ptr(),
                                     .row_stride = weight.stride(0),
                                     .col_stride = weight.stride(1),
                                     .scales = data_or_null<float>(whole_scales),
                                     .zero_points = data_or_null<std::int32_t>(whole_zero_points),
                                     .packed = packed.mutable_data_ptr()};
  run_on(
      kName, weight.device(), [&] { kernels::cpu::pack_linear(args); },
      [&](auto stream) { kernels::cuda::pack_linear(args, stream); });
  return packed;
}

Tensor pack_linear_meta(const Tensor& weight, const std::optional<Tensor>& scales,
                        const std::optional<Tensor>& zero_points, std::string_view format) {
  const LinearShape shape = check(weight, scales, zero_points, format);
  return at::empty(packed_sizes(shape, packs_for_gpu(weight)), weight.options().dtype(at::kByte));
}

}  // namespace

// ------------------------------------------------------------------------------- for other
// operators

bool packs_for_gpu(const Tensor& weight) {
  return weight.is_cuda() || weight.key_set().has_backend(c10::BackendComponent::CUDABit);
}

at::DimVector packed_sizes(const LinearShape& shape, bool for_gpu) {
#if defined(MOQ_WITH_CUDA)
  if (for_gpu) {
    return {static_cast<std::int64_t>(kernels::cuda::packed_linear_size(shape)) / kLine, kLine};
  }
#else
  TORCH_CHECK_NOT_IMPLEMENTED(
      !for_gpu, kName, ": weight must be on the CPU (moq was built without ", "CUDA), got cuda");
#endif
  return {static_cast<std::int64_t>(kernels::cpu::packed_linear_size(shape))};
}

void check_packed(const char* where, const Tensor& packed, const LinearShape& shape,
                  at::Device device) {
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte && (packed.dim() == 1 || packed.dim() == 2),
                   where, ": packed must be what pack_linear returned, got ", packed.dim(),
                   " dimensions of ", name_of(packed.scalar_type()));
  check_contiguous(where, "packed", packed);
  check_device(where, "packed", packed, device);
  const bool for_gpu = packed.dim() == 2;
  TORCH_CHECK_VALUE(device.is_meta() || for_gpu == !device.is_cpu(), where,
                    ": packed must have been packed on ", device.type(), ", got a weight packed ",
                    for_gpu ? "on a GPU" : "on the CPU", "; call pack_linear with the weight on ",
                    device);
  const at::DimVector sizes = packed_sizes(shape, for_gpu);
  const std::int64_t bytes = c10::multiply_integers(sizes);
  TORCH_CHECK_VALUE(packed.sym_numel() == bytes, where, ": a packed weight of ", shape.n, " x ",
                    shape.k, " in ", kernels::name_of(shape.format), " has ", bytes, " bytes, got ",
                    packed.sym_numel());
}

// ------------------------------------------------------------------------------------ registration

TORCH_LIBRARY_IMPL(moq, CPU, m) {
  m.impl(kName, pack_linear);
}

#if defined(MOQ_WITH_CUDA)
TORCH_LIBRARY_IMPL(moq, CUDA, m) {
  m.impl(kName, pack_linear);
}
#endif

TORCH_LIBRARY_IMPL(moq, Meta, m) {
  m.impl(kName, pack_linear_meta);
}

TORCH_LIBRARY_IMPL(moq, Autograd, m) {
  m.impl(kName, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace moq::ops
