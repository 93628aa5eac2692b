#pragma once

#include <cstdint>

#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/random_draws.h"
#include "kernels/cpu/simd/typed_matrix.h"

/// Rounds along contiguous rows, where a group is a run of memory.
namespace moq::kernels::cpu::MOQ_ISA {

/// Quantizes runs of one group's elements, from (row, col) on along the row.
template <typename TypedMatrix>
class RowQuantizer {
 public:
  /// @param ahead  see Run
  RowQuantizer(const TypedMatrix& typed, std::int64_t ahead)
      : typed_(typed), ahead_(ahead), random_draws_(typed.random_draws()) {}

  void quantize(std::int64_t row, std::int64_t col, std::int64_t size, const SharedGrid& grid) {
    const FakeQuantizeTensor& matrix = typed_.matrix;
    if (!typed_.draws()) {
      run(row, col, typed_.run_of(size, ahead_), grid);
      return;
    }
    if (matrix.codes == nullptr && matrix.output != nullptr && typed_.step.blend_ratio == 0.0F) {
      const std::int64_t head = min_of(size, unaligned(row, col));
      const std::int64_t drawn = (size - head) / kDrawn * kDrawn;
      const std::int64_t number = typed_.number_of(row, col + head);
      const auto block = static_cast<std::uint64_t>(number) / kPhiloxHalves;
      if (drawn > 0 && number % kPhiloxHalves == 0 &&
          !straddles(block, block + drawn / kPhiloxHalves)) {
        draw_then_round(row, col, head, grid);
        draw_and_round(row, col + head, drawn, grid, block);
        draw_then_round(row, col + head + drawn, size - head - drawn, grid);
        return;
      }
    }
    draw_then_round(row, col, size, grid);
  }

 private:
  using Input = typename TypedMatrix::Input;
  using Output = typename TypedMatrix::Output;

  std::int64_t place(std::int64_t row, std::int64_t col) const {
    return row * typed_.matrix.row_stride + col;
  }

  /// Elements before one that a streaming store accepts.
  std::int64_t unaligned(std::int64_t row, std::int64_t col) const {
    return typed_.step.stream ? elements_to_alignment(typed_.output + place(row, col)) : 0;
  }

  void run(std::int64_t row, std::int64_t col, const Run& run, const SharedGrid& grid) const {
    if (typed_.matrix.codes != nullptr) {
      store_codes(typed_.matrix, typed_.input + place(row, col), row, col, grid, run);
    }
    if (typed_.matrix.output != nullptr) {
      store_output(typed_.step, typed_.input + place(row, col), typed_.output + place(row, col),
                   grid, run);
    }
  }

  /// A run whose draws are made first.
  void draw_then_round(std::int64_t row, std::int64_t col, std::int64_t size,
                       const SharedGrid& grid) {
    std::uint16_t draws[RandomDraws::capacity(kDrawsFirst) + kWidth];
    for (std::int64_t begin = 0; begin < size; begin += kDrawsFirst) {
      Run part = typed_.run_of(min_of(kDrawsFirst, size - begin), ahead_);
      part.draws = random_draws_.draw(typed_.number_of(row, col + begin), part.size, draws);
      run(row, col + begin, part, grid);
    }
  }

  /// A run that starts with a block's first draw and that is drawn while it is rounded.
  void draw_and_round(std::int64_t row, std::int64_t col, std::int64_t size, const SharedGrid& grid,
                      std::uint64_t block) {
    const RandomBlocks& blocks = random_draws_.blocks_at(block);
    const auto lower_number = static_cast<std::uint32_t>(block);
    const Input* input = typed_.input + place(row, col);
    Output* output = typed_.output + place(row, col);
    if (typed_.step.stream) {
      fake_quantize_drawn<true>(input, output, size, grid.at(0), blocks, lower_number, ahead_);
    } else {
      fake_quantize_drawn<false>(input, output, size, grid.at(0), blocks, lower_number, ahead_);
    }
  }

  /// Elements whose draws are made before they are rounded.
  static constexpr std::int64_t kDrawsFirst = 1024;

  const TypedMatrix& typed_;
  const std::int64_t ahead_;
  RandomDraws random_draws_;
};

}  // namespace moq::kernels::cpu::MOQ_ISA
