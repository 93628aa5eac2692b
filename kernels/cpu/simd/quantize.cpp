#include "kernels/cpu/simd/quantize.h"

#include "kernels/common/quantize_check.h"
#include "kernels/common/visit.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/quantize_row.h"

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

/// What the codes of one row stand for. A NaN stays one; under a grid of its own its whole row is.
template <typename Element>
void fake_quantize_row(const Element* input, std::int64_t size, const GridParams& params,
                       Element* output) {
  const VectorGrid grid{broadcast(params.scale), broadcast(params.inverse_scale),
                        broadcast(static_cast<float>(params.zero_point)),
                        broadcast(static_cast<float>(params.range.qmin)),
                        broadcast(static_cast<float>(params.range.qmax))};
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
    const bool dynamic = args.static_scale == nullptr;
    const GridParams grid =
        dynamic ? activation_grid(activation_statistics(input, args.cols, args.mode), args.mode)
                : static_grid(args);
    if (args.scales != nullptr && dynamic) {
      args.scales[row] = grid.scale;
    }
    if (args.zero_points != nullptr && dynamic) {
      args.zero_points[row] = grid.zero_point;
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

void row_extents(const RowExtentsArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float* input = args.input + row * args.row_stride;
    const GroupExtents extents =
        extents_of(activation_statistics(input, args.cols, args.mode), args.mode);
    args.extents[row] = extents.below;
    if (!is_symmetric(args.mode)) {
      args.extents[args.rows + row] = extents.above;
    }
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
