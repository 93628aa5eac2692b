// Float weights: fused multiply-adds of 32 outputs a panel with up to kTileRows rows of the input.
// Sums are kept in registers for kBlockCols columns and then added to the totals: an output is a
// sum of short sums, in an order that depends on k alone.
#include "kernels/common/half.h"
#include "kernels/cpu/linear_kernels.h"
#include "kernels/cpu/simd/linear_output.h"
#include "kernels/cpu/simd/vector.h"

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

constexpr std::int64_t kBlockCols = 256;
constexpr int kVectors = kPanelRows / kWidth;  // of a panel
/// Rows whose accumulators, kVectors each, fit the registers.
#if defined(MOQ_ISA_avx512)
constexpr int kTileRows = 12;
#elif defined(MOQ_ISA_avx2)
constexpr int kTileRows = 3;
#else
constexpr int kTileRows = 1;
#endif

/// totals[row][i] += Σ over `cols` columns of weight[col][i] * input[col][row].
template <int kRows, typename Element>
void add_block(const Element* weight, std::int64_t cols, const float* input, float* totals) {
  constexpr std::int64_t kPrefetch = 1024 / sizeof(Element);  // as the integer kernels do
  F32 sums[kRows][kVectors] = {};
  for (std::int64_t col = 0; col < cols; ++col) {
    for (std::int64_t i = 0; i < kPanelRows; i += 64 / sizeof(Element)) {
      __builtin_prefetch(weight + kPrefetch + i, 0, 2);
    }
    F32 elements[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      elements[i] = load(weight + i * kWidth);
    }
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const F32 x = broadcast(input[row]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        sums[row][i] = multiply_add(elements[i], x, sums[row][i]);
      }
    }
    weight += kPanelRows;
    input += kRows;
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      float* total = totals + row * kPanelRows + i * kWidth;
      store(total, load(total) + sums[row][i]);
    }
  }
}

template <typename Element>
using AddBlock = void (*)(const Element*, std::int64_t, const float*, float*);

template <typename Element, int... kRowsMinusOne>
AddBlock<Element> find_add_block(std::int64_t rows, std::integer_sequence<int, kRowsMinusOne...>) {
  static constexpr AddBlock<Element> kFunctions[] = {add_block<kRowsMinusOne + 1, Element>...};
  return kFunctions[rows - 1];
}

template <typename Element>
void multiply(const FloatMultiplyArgs& args, const Part& part) {
  for (std::int64_t panel = part.first_panel; panel < part.last_panel; ++panel) {
    for (std::int64_t tile = part.first_tile; tile < part.last_tile; ++tile) {
      const std::int64_t row = tile_begin(tile, args.output.rows, args.output.tiles);
      const std::int64_t rows = tile_begin(tile + 1, args.output.rows, args.output.tiles) - row;
      const auto add = find_add_block<Element>(rows, std::make_integer_sequence<int, kTileRows>());
      const Element* weight =
          static_cast<const Element*>(args.weight) + panel * kPanelRows * args.k;
      const float* input = args.input + row * args.k;
      alignas(64) float totals[kTileRows * kPanelRows] = {};
      for (std::int64_t col = 0; col < args.k; col += kBlockCols) {
        const std::int64_t cols = args.k - col < kBlockCols ? args.k - col : kBlockCols;
        add(weight + col * kPanelRows, cols, input + col * rows, totals);
      }
      for (std::int64_t i = 0; i < rows; ++i) {
        store_row(args.output, row + i, panel, totals + i * kPanelRows, 1.0F);
      }
    }
  }
}

}  // namespace

std::int64_t float_tile_rows() {
  return kTileRows;
}

void multiply_floats(const FloatMultiplyArgs& args, const Part& part) {
  switch (args.format) {
    case WeightFormat::kBFloat16:
      return multiply<BFloat16>(args, part);
    case WeightFormat::kFloat16:
      return multiply<Float16>(args, part);
    default:
      return multiply<float>(args, part);
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
