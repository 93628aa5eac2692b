#include "kernels/quantize.h"

#include <algorithm>

#include "kernels/common/parallel.h"
#include "kernels/common/quantize_check.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/quantize.h"

namespace moq::kernels::cpu {
namespace {

/// Rows that make a range worth handing to a thread.
std::int64_t rows_per_range(std::int64_t cols) {
  constexpr std::int64_t kElements = 16 * 1024;
  return std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(cols, 1));
}

QuantizeActivationArgs rows_of(QuantizeActivationArgs args, std::int64_t begin, std::int64_t end) {
  const auto element_size = static_cast<std::int64_t>(size_of(args.input_dtype));
  args.input = static_cast<const std::byte*>(args.input) + begin * args.row_stride * element_size;
  if (args.output != nullptr) {
    args.output = static_cast<std::byte*>(args.output) + begin * args.cols * element_size;
  }
  if (args.codes != nullptr) {
    args.codes += begin * args.cols;
  }
  if (args.scales != nullptr) {
    args.scales += begin;
  }
  if (args.zero_points != nullptr) {
    args.zero_points += begin;
  }
  args.rows = end - begin;
  return args;
}

template <typename Code, typename Scale, typename Output>
void dequantize_row(const DequantizeArgs& args, std::int64_t row) {
  const Code* codes = static_cast<const Code*>(args.codes) + row * args.cols;
  Output* output = static_cast<Output*>(args.output) + row * args.row_stride;
  const std::int64_t run = args.granularity == Granularity::kPerGroup
                               ? args.group_size
                               : std::max<std::int64_t>(args.cols, 1);
  for (std::int64_t begin = 0; begin < args.cols; begin += run) {
    const std::int64_t group = group_of(args, row, begin);
    const GridParams grid{.scale = to_float(static_cast<const Scale*>(args.scales)[group]),
                          .inverse_scale = 0.0F,
                          .zero_point = args.zero_points != nullptr ? args.zero_points[group] : 0,
                          .range = {}};
    for (std::int64_t col = begin; col < begin + run; ++col) {
      store_float(output + col * args.col_stride, canonical(dequantize_one(codes[col], grid)));
    }
  }
}

/// Calls body(Code{}, Scale{}, Output{}) with the call's element types.
template <typename Body>
void visit_types(const DequantizeArgs& args, const Body& body) {
  visit_float(args.scale_dtype, [&]<typename Scale>(Scale scale) {
    visit_float(args.output_dtype, [&]<typename Output>(Output output) {
      if (args.codes_dtype == DType::kInt8) {
        body(std::int8_t{}, scale, output);
      } else {
        body(std::int16_t{}, scale, output);
      }
    });
  });
}

}  // namespace

void quantize_activation(const QuantizeActivationArgs& args) {
  check_quantize_activation(args);
  MOQ_CHECK(args.static_scale == nullptr || exists(grid_of_scale(*args.static_scale, 8)),
            "quantize_activation: a given scale must be finite and >= ", min_scale(DType::kFloat32),
            ", got ", *args.static_scale);
  MOQ_CHECK(args.static_scale == nullptr || exists(static_grid(args)),
            "quantize_activation: a given zero point must lie in [-128, 127], got ",
            *args.static_zero_point);
  parallel_for(args.rows, rows_per_range(args.cols), [&](std::int64_t begin, std::int64_t end) {
    const QuantizeActivationArgs rows = rows_of(args, begin, end);
    MOQ_DISPATCH_ISA(quantize_activation, rows);
  });
}

void row_extents(const RowExtentsArgs& args) {
  MOQ_CHECK(args.rows >= 0 && args.cols >= 0, "row_extents: shape must be >= 0, got ", args.rows,
            " x ", args.cols);
  parallel_for(args.rows, rows_per_range(args.cols), [&](std::int64_t begin, std::int64_t end) {
    MOQ_DISPATCH_ISA(row_extents, args, begin, end);
  });
}

void dequantize(const DequantizeArgs& args) {
  check_dequantize(args);
  visit_types(args, [&]<typename Code, typename Scale, typename Output>(Code, Scale, Output) {
    parallel_for(args.rows, rows_per_range(args.cols), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        dequantize_row<Code, Scale, Output>(args, row);
      }
    });
  });
}

}  // namespace moq::kernels::cpu
