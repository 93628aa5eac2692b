#include "kernels/cpu/simd/quantize.h"

#include "kernels/common/visit.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/quantize_row.h"

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

/// What the codes of one row stand for. A NaN stays one; under a grid of its own its whole row is.
template <typename Element>
void fake_quantize_row(const Element* input, std::int64_t size, const GridParams& params,
                       Element* output) {
  const auto qmax = static_cast<float>(params.range.qmax);
  const VectorGrid grid{broadcast(params.scale), broadcast(params.inverse_scale), F32{},
                        broadcast(-qmax), broadcast(qmax)};
  const F32 nan = bit_cast<F32>(broadcast(kQuietNaNBits));
  for_each_vector<false>(output, size, [&](std::int64_t i, std::int64_t count) MOQ_INLINE_LAMBDA {
    const F32 value = load_some(input + i, count);
    const F32 result = dequantize(quantize_nearest(value, grid), grid);
    store_some<false>(output + i, value == value ? result : nan, count);
  });
}

template <typename Element>
void quantize_rows(const QuantizeActivationArgs& args) {
  for (std::int64_t row = 0; row < args.rows; ++row) {
    const Element* input = static_cast<const Element*>(args.input) + row * args.row_stride;
    const GridParams grid =
        args.static_scale != nullptr
            ? grid_of_scale(*args.static_scale, 8)
            : activation_grid(statistics_of<QuantMode::kSymmetric>(input, args.cols));
    if (args.scales != nullptr && args.static_scale == nullptr) {
      args.scales[row] = grid.scale;
    }
    if (args.codes != nullptr) {
      quantize_row(input, args.cols, grid, args.codes + row * args.cols);
    }
    if (args.output != nullptr) {
      fake_quantize_row(input, args.cols, grid,
                        static_cast<Element*>(args.output) + row * args.cols);
    }
  }
}

}  // namespace

void quantize_activation(const QuantizeActivationArgs& args) {
  visit_float(args.input_dtype, [&]<typename Element>(Element) { quantize_rows<Element>(args); });
}

void row_absmax(const RowAbsmaxArgs& args) {
  for (std::int64_t row = 0; row < args.rows; ++row) {
    args.absmax[row] = bit_cast<float>(
        statistics_of<QuantMode::kSymmetric>(args.input + row * args.row_stride, args.cols)
            .highest);
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
