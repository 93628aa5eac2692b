#include "csrc/ops/quantizer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "kernels/common/parallel.h"

#if defined(MOQ_WITH_CUDA)
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace moq::ops {
namespace {

using kernels::Granularity;

bool is_one_of(std::string_view name, std::initializer_list<std::string_view> known) {
  return std::find(known.begin(), known.end(), name) != known.end();
}

Granularity granularity_of(std::string_view name) {
  return name == "per_tensor"    ? Granularity::kPerTensor
         : name == "per_channel" ? Granularity::kPerChannel
                                 : Granularity::kPerGroup;
}

}  // namespace

void check_float(const char* where, const char* what, at::ScalarType type) {
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, where, ": ",
                   what, " must be float32, float16 or bfloat16, got ", type);
}

DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kChar:
      return DType::kInt8;
    case at::kShort:
      return DType::kInt16;
    default:
      TORCH_INTERNAL_ASSERT(false, "an unchecked type reached a kernel: ", type);
  }
}

void check_quantizer(const char* where, const at::Tensor& weight, const Quantizer& quantizer) {
  TORCH_CHECK_VALUE(weight.dim() == 2, where,
                    ": weight must be a matrix [out_features, in_features] (or transposed), got ",
                    weight.dim(), " dimensions");
  check_float(where, "weight", weight.scalar_type());
  check_float(where, "scale_dtype", quantizer.scale_dtype.value_or(weight.scalar_type()));
  TORCH_CHECK_VALUE(quantizer.num_bits >= kMinBits && quantizer.num_bits <= kMaxBits, where,
                    ": num_bits must be in [", kMinBits, ", ", kMaxBits, "], got ",
                    quantizer.num_bits);
  TORCH_CHECK_VALUE(is_one_of(quantizer.granularity, {"per_tensor", "per_channel", "per_group"}),
                    where, ": granularity must be per_tensor, per_channel or per_group, got ",
                    quantizer.granularity);
  TORCH_CHECK_VALUE(is_one_of(quantizer.mode, {"symmetric", "asymmetric"}), where,
                    ": mode must be symmetric or asymmetric, got ", quantizer.mode);
  TORCH_CHECK_VALUE(is_one_of(quantizer.rounding, {"nearest", "stochastic"}), where,
                    ": rounding must be nearest or stochastic, got ", quantizer.rounding);
  TORCH_CHECK_VALUE(quantizer.name_hash >= 0 && quantizer.name_hash < (std::int64_t{1} << 32),
                    where, ": name_hash must be a 32-bit hash in [0, 2^32), got ",
                    quantizer.name_hash);
  TORCH_CHECK_VALUE(quantizer.blend_ratio >= 0.0 && quantizer.blend_ratio <= 1.0, where,
                    ": blend_ratio must be in [0, 1], got ", quantizer.blend_ratio);
  if (quantizer.granularity == "per_group") {
    const c10::SymInt in_features = features_of(weight, quantizer.transposed).in;
    TORCH_CHECK_VALUE(quantizer.group_size > 0 && in_features % quantizer.group_size == 0, where,
                      ": group_size must divide the input features, got ", quantizer.group_size,
                      " and ", in_features);
  } else {
    TORCH_CHECK_VALUE(quantizer.group_size == 0, where,
                      ": group_size belongs to granularity per_group, got ", quantizer.group_size,
                      " with ", quantizer.granularity);
  }
}

Features features_of(const at::Tensor& weight, bool transposed) {
  return {weight.sym_size(transposed ? 1 : 0), weight.sym_size(transposed ? 0 : 1)};
}

c10::SymDimVector scale_sizes(const at::Tensor& weight, const Quantizer& quantizer) {
  const Features features = features_of(weight, quantizer.transposed);
  switch (granularity_of(quantizer.granularity)) {
    case Granularity::kPerTensor:
      return {1};
    case Granularity::kPerChannel:
      return {features.out, 1};
    default:
      return {features.out, features.in / quantizer.group_size};
  }
}

kernels::FakeQuantizeTensor describe(const at::Tensor& weight, const Quantizer& quantizer) {
  const int rows = quantizer.transposed ? 1 : 0;
  const int cols = quantizer.transposed ? 0 : 1;
  return {.input = weight.const_data_ptr(),
          .rows = weight.size(rows),
          .cols = weight.size(cols),
          .row_stride = weight.stride(rows),
          .col_stride = weight.stride(cols),
          .group_size = quantizer.group_size,
          .name_hash = static_cast<std::uint32_t>(quantizer.name_hash),
          .input_dtype = dtype_of(weight.scalar_type()),
          .output_dtype = dtype_of(weight.scalar_type()),
          .scale_dtype = dtype_of(quantizer.scale_dtype.value_or(weight.scalar_type())),
          .granularity = granularity_of(quantizer.granularity),
          .mode = quantizer.mode == "symmetric" ? QuantMode::kSymmetric : QuantMode::kAsymmetric,
          .rounding = quantizer.rounding == "nearest" ? Rounding::kNearest : Rounding::kStochastic};
}

void run_fake_quantize(kernels::FakeQuantizeArgs args, at::Device device) {
  if (device.is_cpu()) {
    const kernels::ThreadScope threads(at::get_num_threads());
    return kernels::cpu::fake_quantize(args);
  }
#if defined(MOQ_WITH_CUDA)
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    const auto bytes =
        static_cast<std::int64_t>(kernels::cuda::fake_quantize_workspace_size(args.tensors));
    // The caching allocator hands the block out again only in the order of this stream.
    const at::Tensor workspace = at::empty({bytes}, at::TensorOptions(device).dtype(at::kByte));
    args.workspace = workspace.mutable_data_ptr();
    return kernels::cuda::fake_quantize(args, c10::cuda::getCurrentCUDAStream());
  }
  constexpr const char* kDevices = "the CPU or a CUDA device";
#else
  constexpr const char* kDevices = "the CPU (moq was built without CUDA)";
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, "fake_quantize: weights must be on ", kDevices, ", got ",
                              device, "; move the model there");
}

void run_fake_quantize(const at::Tensor& weight, const kernels::FakeQuantizeTensor& matrix,
                       const Quantizer& quantizer) {
  const auto options = at::TensorOptions(weight.device());
  const at::Tensor num_bits = at::full({1}, quantizer.num_bits, options.dtype(at::kInt));
  const at::Tensor blend_ratio = at::full({1}, quantizer.blend_ratio, options.dtype(at::kFloat));
  const at::Tensor step = at::full({1}, quantizer.step, options.dtype(at::kLong));
  run_fake_quantize({.tensors = {&matrix, 1},
                     .num_bits = num_bits.const_data_ptr<std::int32_t>(),
                     .blend_ratio = blend_ratio.const_data_ptr<float>(),
                     .seed = static_cast<std::uint64_t>(quantizer.seed),
                     .step = step.const_data_ptr<std::int64_t>()},
                    weight.device());
}

}  // namespace moq::ops
