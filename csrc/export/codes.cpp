#include "csrc/export/codes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "inference/checkpoint/packing.h"
#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/half.h"
#include "kernels/common/parallel.h"

namespace moq::exporter {
namespace {

DType kernel_dtype(c10::ScalarType dtype, const std::string& name) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return DType::kFloat32;
    case c10::ScalarType::Half:
      return DType::kFloat16;
    case c10::ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      moq::detail::fail(name, ": expected float32, float16 or bfloat16, got ",
                        c10::toString(dtype));
  }
}

float load_float(const void* data, std::int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return float16_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case DType::kBFloat16:
      return bfloat16_to_float(static_cast<const std::uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

/// A tensor as a matrix [output features, input features] whatever its storage.
struct Matrix {
  const void* data;
  DType dtype;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t row_stride;
  std::int64_t col_stride;

  Matrix(const at::Tensor& tensor, bool transposed, const std::string& name)
      : data(tensor.const_data_ptr()),
        dtype(kernel_dtype(tensor.scalar_type(), name)),
        rows(tensor.size(transposed ? 1 : 0)),
        cols(tensor.size(transposed ? 0 : 1)),
        row_stride(tensor.stride(transposed ? 1 : 0)),
        col_stride(tensor.stride(transposed ? 0 : 1)) {}

  float at(std::int64_t row, std::int64_t col) const {
    return load_float(data, row * row_stride + col * col_stride, dtype);
  }
};

/// The kernel's description of a matrix that lies on the grid of `spec`, its outputs still null.
kernels::FakeQuantizeTensor describe(const Matrix& matrix, const GridSpec& spec,
                                     const std::string& name) {
  return {.input = matrix.data,
          .rows = matrix.rows,
          .cols = matrix.cols,
          .row_stride = matrix.row_stride,
          .col_stride = matrix.col_stride,
          .group_size = spec.group_size,
          .input_dtype = matrix.dtype,
          .output_dtype = matrix.dtype,
          .scale_dtype = kernel_dtype(spec.scale_dtype, name),
          .granularity = spec.granularity,
          .mode = spec.mode,
          .scale_rule = spec.scale_rule};
}

/// The grids of a matrix, as the kernel that trains computes them.
struct Grids {
  at::Tensor scales;       // [num_groups]
  at::Tensor zero_points;  // [num_groups] int32
};

Grids grids_of(kernels::FakeQuantizeTensor master, const GridSpec& spec) {
  Grids grids{at::empty({num_groups(master)}, spec.scale_dtype),
              at::empty({num_groups(master)}, c10::ScalarType::Int)};
  master.scales = grids.scales.mutable_data_ptr();
  master.zero_points = grids.zero_points.mutable_data_ptr<std::int32_t>();
  const std::int32_t num_bits = spec.num_bits;
  kernels::cpu::fake_quantize({.tensors = std::span(&master, 1), .num_bits = &num_bits});
  return grids;
}

/// Where a check failed first, over all threads.
class FirstFailure {
 public:
  void report(std::int64_t element) {
    std::int64_t first = element_.load();
    while (element < first && !element_.compare_exchange_weak(first, element)) {
    }
  }
  bool found() const { return element_.load() != std::numeric_limits<std::int64_t>::max(); }
  std::int64_t element() const { return element_.load(); }

 private:
  std::atomic<std::int64_t> element_{std::numeric_limits<std::int64_t>::max()};
};

void refuse_nonfinite(const Matrix& matrix, const std::string& name, const char* which) {
  FirstFailure failure;
  kernels::parallel_for(matrix.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t col = 0; col < matrix.cols; ++col) {
        if (!std::isfinite(matrix.at(row, col))) {
          failure.report(row * matrix.cols + col);
          return;
        }
      }
    }
  });
  MOQ_CHECK(!failure.found(), name, ": expected finite ", which, " weights, got ",
            matrix.at(failure.element() / matrix.cols, failure.element() % matrix.cols),
            " for output feature ", failure.element() / matrix.cols, ", input feature ",
            failure.element() % matrix.cols);
}

/// The number that readers of the checkpoint will compute.
float stored_value(std::int32_t code, const GridParams& grid, DType dtype) {
  return round_to(dequantize_one(code, grid), dtype);
}

}  // namespace

StoredCodes recover_codes(const std::string& name, const at::Tensor& master,
                          const at::Tensor& simulated, const GridSpec& spec,
                          const at::Tensor& absmax) {
  MOQ_CHECK(master.dim() == 2 && master.sizes() == simulated.sizes(), name,
            ": expected two matrices of one shape, got ", master.sizes(), " and ",
            simulated.sizes());
  MOQ_CHECK(master.is_cpu() && simulated.is_cpu(), name, ": expected tensors in host memory");
  MOQ_CHECK(spec.num_bits >= min_bits(spec.mode) && spec.num_bits <= 8, name,
            ": expected a width from ", min_bits(spec.mode), " to 8 bits, got ", spec.num_bits);
  const kernels::ThreadScope threads(at::get_num_threads());
  const Matrix source(master, spec.transposed, name);
  const Matrix target(simulated, spec.transposed, name);
  const std::int64_t rows = target.rows;
  const std::int64_t cols = target.cols;
  MOQ_CHECK(spec.granularity != kernels::Granularity::kPerGroup ||
                (spec.group_size > 0 && cols % spec.group_size == 0),
            name, ": expected a group_size that divides ", cols, " input features, got ",
            spec.group_size);
  MOQ_CHECK(spec.granularity != kernels::Granularity::kPerRows ||
                (spec.group_size > 0 && rows % spec.group_size == 0),
            name, ": expected a group_size that divides ", rows, " output features, got ",
            spec.group_size);
  refuse_nonfinite(source, name, "master");
  refuse_nonfinite(target, name, "simulated");

  kernels::FakeQuantizeTensor trained = describe(source, spec, name);
  if (spec.scale_rule == ScaleRule::kGiven) {
    MOQ_CHECK(absmax.defined() && absmax.scalar_type() == c10::ScalarType::Float &&
                  absmax.is_cpu() && absmax.is_contiguous() &&
                  absmax.numel() == kernels::num_groups(trained),
              name, ": expected ", kernels::num_groups(trained), " learned scales of float32");
    trained.given_absmax = absmax.const_data_ptr<float>();
  }
  const Grids grids = grids_of(trained, spec);
  const std::int64_t groups_per_row = kernels::groups_per_row(trained);
  const std::int64_t group_cols = kernels::columns_per_group(trained);
  const GridRange range = grid_range(spec.num_bits, spec.mode);
  const auto* zero_points = grids.zero_points.const_data_ptr<std::int32_t>();
  const auto grid_of = [&](std::int64_t row, std::int64_t group) -> GridParams {
    const std::int64_t index = row / kernels::rows_per_group(trained) * groups_per_row + group;
    const float scale = load_float(grids.scales.const_data_ptr(), index, trained.scale_dtype);
    // Simulated values are points of the grid already: the nearest one is theirs in every mode.
    return {scale, 1.0F / scale, zero_points[index], range};
  };

  StoredCodes stored;
  stored.codes = at::empty({rows, cols}, c10::ScalarType::Char);
  auto* codes = stored.codes.mutable_data_ptr<std::int8_t>();
  std::vector<double> squared_error(static_cast<std::size_t>(rows));
  std::vector<double> squared_norm(static_cast<std::size_t>(rows));
  FirstFailure failure;
  kernels::parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      double error = 0;
      double norm = 0;
      for (std::int64_t group = 0; group < groups_per_row; ++group) {
        const GridParams grid = grid_of(row, group);
        for (std::int64_t col = group * group_cols; col < (group + 1) * group_cols; ++col) {
          const float value = target.at(row, col);
          const std::int32_t code = quantize_one(value, grid, Rounding::kNearest, 0.0F);
          if (std::bit_cast<std::uint32_t>(stored_value(code, grid, target.dtype)) !=
              std::bit_cast<std::uint32_t>(value)) {
            failure.report(row * cols + col);
          }
          codes[row * cols + col] = static_cast<std::int8_t>(code);
          const double exact = source.at(row, col);
          error += (exact - value) * (exact - value);
          norm += exact * exact;
        }
      }
      squared_error[static_cast<std::size_t>(row)] = error;
      squared_norm[static_cast<std::size_t>(row)] = norm;
    }
  });
  if (failure.found()) {
    const std::int64_t row = failure.element() / cols;
    const std::int64_t col = failure.element() % cols;
    const GridParams grid = grid_of(row, col / group_cols);
    const std::int32_t code{codes[failure.element()]};
    moq::detail::fail(name, ": expected the simulated weight to lie on the ", spec.num_bits,
                      "-bit grid of its master, got ", target.at(row, col), " for output feature ",
                      row, ", input feature ", col, ", where the nearest grid point is ",
                      stored_value(code, grid, target.dtype),
                      ": export after the optimizer's last step, with a blend ratio of 0");
  }

  const double norm = std::accumulate(squared_norm.begin(), squared_norm.end(), 0.0);
  const double error = std::accumulate(squared_error.begin(), squared_error.end(), 0.0);
  stored.quantization_error = norm > 0 ? std::sqrt(error / norm) : 0.0;
  const std::int64_t sharing = kernels::rows_per_group(trained);
  const auto as_matrix = [&](const at::Tensor& values) {
    return kernels::rows_share_scales(trained)
               ? values.repeat_interleave(sharing).slice(0, 0, rows).unsqueeze(1)
               : values.view({rows, groups_per_row});
  };
  stored.scales = as_matrix(grids.scales);
  if (spec.mode == QuantMode::kAsymmetric) {
    stored.zero_points = as_matrix(grids.zero_points).to(c10::ScalarType::Char);
  }
  return stored;
}

at::Tensor pack_codes(const at::Tensor& codes, int num_bits) {
  MOQ_CHECK(codes.dim() == 2 && codes.scalar_type() == c10::ScalarType::Char && codes.is_cpu(),
            "pack_codes: expected an int8 matrix in host memory");
  const at::Tensor source = codes.contiguous();
  const std::int64_t rows = source.size(0);
  const std::int64_t columns = source.size(1);
  at::Tensor words =
      at::empty({rows, checkpoint::packed_words(columns, num_bits)}, c10::ScalarType::Int);
  checkpoint::pack_codes(
      {source.const_data_ptr<std::int8_t>(), static_cast<std::size_t>(source.numel())}, rows,
      columns, num_bits,
      {reinterpret_cast<std::uint32_t*>(words.mutable_data_ptr<std::int32_t>()),
       static_cast<std::size_t>(words.numel())});
  return words;
}

at::Tensor unpack_codes(const at::Tensor& words, int num_bits, std::int64_t columns) {
  MOQ_CHECK(words.dim() == 2 && words.scalar_type() == c10::ScalarType::Int && words.is_cpu(),
            "unpack_codes: expected an int32 matrix in host memory");
  const at::Tensor source = words.contiguous();
  const std::int64_t rows = source.size(0);
  MOQ_CHECK(source.size(1) == checkpoint::packed_words(columns, num_bits),
            "unpack_codes: expected ", checkpoint::packed_words(columns, num_bits), " words for ",
            columns, " codes of ", num_bits, " bits, got ", source.size(1));
  at::Tensor codes = at::empty({rows, columns}, c10::ScalarType::Char);
  const auto row_bytes = static_cast<std::size_t>(source.size(1)) * sizeof(std::int32_t);
  const auto* bytes = reinterpret_cast<const std::byte*>(source.const_data_ptr<std::int32_t>());
  for (std::int64_t row = 0; row < rows; ++row) {
    checkpoint::unpack_codes(
        {bytes + static_cast<std::size_t>(row) * row_bytes, row_bytes}, num_bits, 0,
        {codes.mutable_data_ptr<std::int8_t>() + row * columns, static_cast<std::size_t>(columns)});
  }
  return codes;
}

}  // namespace moq::exporter
