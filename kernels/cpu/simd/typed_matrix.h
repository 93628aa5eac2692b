#pragma once

#include <cstdint>

#include "kernels/common/visit.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/fake_quantize.h"
#include "kernels/cpu/simd/group_grids.h"
#include "kernels/cpu/simd/random_draws.h"

/// What fake-quantize of either storage needs of a matrix whose element types are known.
namespace moq::kernels::cpu::MOQ_ISA {

inline std::int64_t min_of(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
inline std::int64_t max_of(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}

/// One matrix with its pointers' types.
template <typename InputType, typename OutputType>
struct Typed {
  using Input = InputType;
  using Output = OutputType;

  const FakeQuantizeTensor& matrix;
  const FakeQuantizeStep& step;
  const Input* input = static_cast<const Input*>(matrix.input);
  Output* output = static_cast<Output*>(matrix.output);

  RandomDraws random_draws() const { return RandomDraws({step.seed, step.step, matrix.name_hash}); }
  bool sign_codes() const { return has_sign_codes(matrix.mode, step.num_bits); }
  bool draws() const { return matrix.rounding == Rounding::kStochastic && !sign_codes(); }
  Run run_of(std::int64_t size, std::int64_t ahead) const {
    return {size, nullptr, step.blend_ratio, sign_codes(), ahead};
  }
  GridSpec grid_spec() const {
    return {step.num_bits, matrix.mode, matrix.scale_rule, matrix.scale_dtype};
  }
  std::int64_t number_of(std::int64_t row, std::int64_t col) const {
    const std::int64_t pitch = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
    return matrix.first_element + row * pitch + col;
  }
};

/// Writes scale and zero point of group `group` of the matrix from element `i` of `grids`.
inline void store_parameters(const FakeQuantizeTensor& matrix, const GroupGrids& grids, int i,
                             std::int64_t group) {
  if (matrix.scales != nullptr) {
    visit_float(matrix.scale_dtype, [&]<typename Scale>(Scale) {
      store_float(static_cast<Scale*>(matrix.scales) + group, grids.scale[i]);
    });
  }
  if (matrix.zero_points != nullptr) {
    matrix.zero_points[group] = static_cast<std::int32_t>(grids.zero_point[i]);
  }
}

/// Writes the codes of a run that starts at (row, col).
template <typename Input, typename Grids>
inline void store_codes(const FakeQuantizeTensor& matrix, const Input* input, std::int64_t row,
                        std::int64_t col, const Grids& grids, const Run& run) {
  const std::int64_t first = row * matrix.cols + col;
  if (matrix.codes_dtype == DType::kInt8) {
    quantize_run(input, static_cast<std::int8_t*>(matrix.codes) + first, grids, run);
  } else {
    quantize_run(input, static_cast<std::int16_t*>(matrix.codes) + first, grids, run);
  }
}

/// Quantizes one run by the leanest loop that does what `step` asks for.
template <typename Input, typename Output, typename Grids>
inline void store_output(const FakeQuantizeStep& step, const Input* input, Output* output,
                         const Grids& grids, const Run& run) {
  const bool plain = run.draws == nullptr && run.blend_ratio == 0.0F && !run.sign_codes;
  if (plain && step.stream) {
    fake_quantize_run<true, true>(input, output, grids, run);
  } else if (plain) {
    fake_quantize_run<true, false>(input, output, grids, run);
  } else if (step.stream) {
    fake_quantize_run<false, true>(input, output, grids, run);
  } else {
    fake_quantize_run<false, false>(input, output, grids, run);
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
