#include "csrc/ops/quantizer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include "csrc/grid_names.h"
#include "csrc/ops/checks.h"
#include "csrc/ops/dispatch.h"

namespace moq::ops {

using kernels::Granularity;

void check_float(const char* where, const char* what, at::ScalarType type) {
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, where, ": ",
                   what, " must be float32, float16 or bfloat16, got ", name_of(type));
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

Quantizer parse_quantizer(const char* where, std::int64_t num_bits, std::string_view granularity,
                          std::int64_t group_size, std::string_view mode, std::string_view rounding,
                          std::int64_t seed, std::int64_t step, std::int64_t name_hash,
                          bool transposed, double blend_ratio,
                          std::optional<at::ScalarType> scale_dtype, std::string_view scale_rule) {
  return {.num_bits = num_bits,
          .granularity = parse_granularity(where, granularity),
          .group_size = group_size,
          .mode = parse_mode(where, mode),
          .rounding = parse_rounding(where, rounding),
          .seed = seed,
          .step = step,
          .name_hash = name_hash,
          .transposed = transposed,
          .blend_ratio = blend_ratio,
          .scale_dtype = scale_dtype,
          .scale_rule = parse_scale_rule(where, scale_rule)};
}

void check_quantizer(const char* where, const at::Tensor& weight, const Quantizer& quantizer) {
  TORCH_CHECK_VALUE(weight.dim() == 2, where,
                    ": weight must be a matrix [out_features, in_features] (or transposed), got ",
                    weight.dim(), " dimensions");
  check_float(where, "weight", weight.scalar_type());
  TORCH_CHECK_VALUE(quantizer.scale_rule != ScaleRule::kGiven, where,
                    ": scale_rule must be absmax or mse, got given");
  check_float(where, "scale_dtype", quantizer.scale_dtype.value_or(weight.scalar_type()));
  const int least_bits = min_bits(quantizer.mode);
  TORCH_CHECK_VALUE(quantizer.num_bits >= least_bits && quantizer.num_bits <= kMaxBits, where,
                    ": num_bits must be in [", least_bits, ", ", kMaxBits, "], got ",
                    quantizer.num_bits);
  const bool ends_in_signs =
      quantizer.mode == QuantMode::kTernary || quantizer.mode == QuantMode::kBinary;
  TORCH_CHECK_VALUE(quantizer.rounding == Rounding::kNearest || !ends_in_signs, where,
                    ": rounding must be nearest for ternary and binary codes, which are signs, "
                    "got stochastic");
  TORCH_CHECK_VALUE(quantizer.name_hash >= 0 && quantizer.name_hash < (std::int64_t{1} << 32),
                    where, ": name_hash must be a 32-bit hash in [0, 2^32), got ",
                    quantizer.name_hash);
  TORCH_CHECK_VALUE(quantizer.blend_ratio >= 0.0 && quantizer.blend_ratio <= 1.0, where,
                    ": blend_ratio must be in [0, 1], got ", quantizer.blend_ratio);
  const Features features = features_of(weight, quantizer.transposed);
  if (quantizer.granularity == Granularity::kPerGroup) {
    TORCH_CHECK_VALUE(quantizer.group_size > 0 && features.in % quantizer.group_size == 0, where,
                      ": group_size must divide the input features, got ", quantizer.group_size,
                      " and ", features.in);
  } else if (quantizer.granularity == Granularity::kPerRows) {
    TORCH_CHECK_VALUE(quantizer.group_size > 0 && features.out % quantizer.group_size == 0, where,
                      ": group_size must divide the output features, got ", quantizer.group_size,
                      " and ", features.out);
  } else {
    TORCH_CHECK_VALUE(quantizer.group_size == 0, where,
                      ": group_size belongs to granularity per_group and per_rows, got ",
                      quantizer.group_size, " with another");
  }
}

Features features_of(const at::Tensor& weight, bool transposed) {
  return {weight.sym_size(transposed ? 1 : 0), weight.sym_size(transposed ? 0 : 1)};
}

c10::SymDimVector scale_sizes(const at::Tensor& weight, const Quantizer& quantizer) {
  const Features features = features_of(weight, quantizer.transposed);
  switch (quantizer.granularity) {
    case Granularity::kPerTensor:
      return {1};
    case Granularity::kPerChannel:
      return {features.out, 1};
    case Granularity::kPerRows:
      return {features.out / quantizer.group_size, 1};
    default:
      return {features.out, features.in / quantizer.group_size};
  }
}

c10::SymInt num_scales(const at::Tensor& weight, const Quantizer& quantizer) {
  c10::SymInt product = 1;
  for (const c10::SymInt& size : scale_sizes(weight, quantizer)) {
    product *= size;
  }
  return product;
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
          .granularity = quantizer.granularity,
          .mode = quantizer.mode,
          .rounding = quantizer.rounding,
          .scale_rule = quantizer.scale_rule};
}

at::Tensor stored_like(const at::Tensor& result, const at::Tensor& matrix) {
  return matrix.strides() == result.strides() ? matrix : at::empty_like(result).copy_(matrix);
}

void run_fake_quantize(kernels::FakeQuantizeArgs args, at::Device device) {
  run_on(
      "fake_quantize", device, [&] { kernels::cpu::fake_quantize(args); },
      [&](auto stream) {
        const auto bytes =
            static_cast<std::int64_t>(kernels::cuda::fake_quantize_workspace_size(args.tensors));
        // The caching allocator hands the block out again only in the order of this stream.
        const at::Tensor workspace = at::empty({bytes}, at::TensorOptions(device).dtype(at::kByte));
        args.workspace = workspace.mutable_data_ptr();
        kernels::cuda::fake_quantize(args, stream);
      });
}

void run_collect_groups(const kernels::FakeQuantizeArgs& args, int stage, at::Device device) {
  run_on(
      "collect_groups", device, [&] { kernels::cpu::collect_groups(args, stage); },
      [&](auto stream) { kernels::cuda::collect_groups(args, stage, stream); });
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
