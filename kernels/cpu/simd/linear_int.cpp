// Integer weights: the input split into digits, dot products panel by panel, their sums put
// together in float64. All numbers up to the product with the scale are integers below 2^53, hence
// exact, and the operations from there on are the same everywhere: an output does not depend on the
// instruction set, the batch or the number of threads.
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "kernels/cpu/linear_kernels.h"
#include "kernels/cpu/simd/linear_output.h"
#include "kernels/cpu/simd/quantize_row.h"
#include "kernels/cpu/simd/vector.h"

#if defined(MOQ_ISA_avx512)
#include "kernels/cpu/simd/linear_dot_avx512.h"
#elif defined(MOQ_ISA_avx2)
#include "kernels/cpu/simd/linear_dot_avx2.h"
#else
#include "kernels/cpu/simd/linear_dot_scalar.h"
#endif

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

constexpr std::int64_t kChunk = 16;  // columns that write_digits takes
static_assert(kPieceCols % kChunk == 0 && kChunk % kWidth == 0);

// ------------------------------------------------------------------------------------------ input

/// x = rint(value * scale * more_scale), limited to [lowest, highest]; x stands for x * unit.
struct InputGrid {
  float scale;
  float more_scale;
  float lowest;
  float highest;
  double unit;
  std::int32_t zero_point = 0;
};

constexpr float kNoLimit = std::numeric_limits<float>::infinity();
/// Every x is 0, every result NaN.
constexpr InputGrid kNoResult = {0.0F, 0.0F, 0.0F, 0.0F, std::numeric_limits<double>::quiet_NaN()};

/// Vectors of ones of a tile.
constexpr std::int64_t ones_of(InputMode mode) {
  return !is_symmetric(grid_mode(mode)) && kDigitBits <= 8 ? 1 : 0;
}

/// Powers of two that bring the row's absmax between 2^29 and 2^30: two of them, since one may be
/// out of float32's range. Both products are exact.
InputGrid exact_grid(GroupStatistics row) {
  if (has_nonfinite(row)) {
    return kNoResult;
  }
  const auto absmax = std::bit_cast<float>(row.highest);
  const int exponent = absmax > 0.0F ? 29 - std::ilogb(absmax) : 0;
  const int half = exponent / 2;
  return {std::ldexp(1.0F, half), std::ldexp(1.0F, exponent - half), -kNoLimit, kNoLimit,
          std::ldexp(1.0, -exponent)};
}

InputGrid int8_grid(const GridParams& grid) {
  if (!exists(grid)) {
    return kNoResult;
  }
  return {grid.inverse_scale,
          1.0F,
          static_cast<float>(grid.range.qmin - grid.zero_point),
          static_cast<float>(grid.range.qmax - grid.zero_point),
          grid.scale,
          grid.zero_point};
}

/// Grid of row `row` of the tile.
InputGrid input_grid(const SplitArgs& args, std::int64_t row, std::int64_t size) {
  const float* input = args.input + row * args.input_stride;
  const InputMode mode = args.rounding.mode;
  if (is_static(mode)) {
    const bool has_nan = statistics_of<QuantMode::kSymmetric>(input, size).highest > kInfinityBits;
    return has_nan ? kNoResult : int8_grid(static_grid(args.rounding));
  }
  const QuantMode quant_mode = grid_mode(mode);
  GroupStatistics statistics = activation_statistics(input, size, quant_mode);
  if (mode == InputMode::kFloat32) {
    return exact_grid(statistics);
  }
  if (args.input_above != nullptr && !has_nonfinite(statistics)) {
    statistics =
        moq::statistics_of(GroupExtents{args.input_below[row], args.input_above[row]}, quant_mode);
  }
  return int8_grid(activation_grid(statistics, quant_mode));
}

/// The sum of a piece's integers, kept as low and high halves: each fits its 32 bits.
struct PieceSum {
  I32 low{};
  I32 high{};

  double take() {
    std::int32_t lows[kWidth];
    std::int32_t highs[kWidth];
    std::memcpy(lows, &low, sizeof(low));
    std::memcpy(highs, &high, sizeof(high));
    std::int64_t sum = 0;
    for (int i = 0; i < kWidth; ++i) {
      sum += highs[i] * std::int64_t{65536} + lows[i];
    }
    low = high = I32{};
    return static_cast<double>(sum);
  }
};

/// The integers of kChunk columns.
void to_integers(const float* values, const InputGrid& grid, std::int32_t* x, PieceSum& sum) {
  for (std::int64_t i = 0; i < kChunk; i += kWidth) {
    const F32 scaled = load(values + i) * broadcast(grid.scale) * broadcast(grid.more_scale);
    const F32 below = minimum(round_nearest(scaled), broadcast(grid.highest));  // NaN: the limit
    const I32 integers = convert<I32>(maximum(below, broadcast(grid.lowest)));
    std::memcpy(x + i, &integers, sizeof(integers));
    sum.low += integers & 0xffff;
    sum.high += integers >> 16;
  }
}

/// Turns x into codes, in the first `size` of kChunk columns.
void add_zero_point(std::int32_t* x, std::int32_t zero_point, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) {
    x[i] += zero_point;
  }
}

/// Writes the kDigits vectors of one row and the sums of its pieces.
/// @tparam kCodes  digits are codes: x + zero_point
template <int kDigits, bool kCodes>
void split_row(const float* row, const InputGrid& grid, const IntegerLayout& layout,
               std::int64_t stride, Digit* output, double* sums) {
  const std::int64_t padded = layout.blocks_per_group * layout.block_cols;
  for (std::int64_t group = 0; group < layout.groups; ++group, row += layout.group_size) {
    PieceSum sum;
    for (std::int64_t col = 0; col < padded; col += kChunk) {
      const std::int64_t left = layout.group_size - col;
      alignas(64) std::int32_t x[kChunk];
      if (left >= kChunk) {
        to_integers(row + col, grid, x, sum);
        if constexpr (kCodes) {
          add_zero_point(x, grid.zero_point, kChunk);
        }
      } else {
        alignas(64) float values[kChunk] = {};
        std::memcpy(values, row + col, left * sizeof(float));
        to_integers(values, grid, x, sum);
        if constexpr (kCodes) {
          add_zero_point(x, grid.zero_point, left);
        }
      }
      const std::int64_t steps = (padded - col < kChunk ? padded - col : kChunk) / kStepCols;
      write_digits<kDigits>(x, steps, stride, output);
      output += steps * stride;
      const std::int64_t end = col + kChunk;
      if (end % kPieceCols == 0 || end >= padded) {
        *sums++ = sum.take();
      }
    }
  }
}

/// Writes a tile's vector of ones; columns of padding have 0.
void write_ones(const IntegerLayout& layout, std::int64_t stride, Digit* output) {
  const std::int64_t padded = layout.blocks_per_group * layout.block_cols;
  for (std::int64_t group = 0; group < layout.groups; ++group) {
    for (std::int64_t col = 0; col < padded; col += kStepCols) {
      for (std::int64_t i = 0; i < kStepCols; ++i) {
        output[i] = col + i < layout.group_size ? 1 : 0;
      }
      output += stride;
    }
  }
}

// ----------------------------------------------------------------------------------------- output

/// As many float64 numbers as a vector register holds.
#if defined(MOQ_ISA_avx512) || defined(MOQ_ISA_avx2)
constexpr int kDoubles = kWidth / 2;
using F64 = double __attribute__((vector_size(8 * kDoubles)));
using HalfF32 = float __attribute__((vector_size(4 * kDoubles)));
using HalfI32 = std::int32_t __attribute__((vector_size(4 * kDoubles)));
#else
constexpr int kDoubles = 1;
using F64 = double;
using HalfF32 = float;
using HalfI32 = std::int32_t;
#endif

template <typename Half>
[[gnu::always_inline]] inline F64 load_doubles(const void* values) {
  return convert<F64>(load_bits<Half>(values));
}

/// totals[i] += scale[i] * Σ x * (element - base[i]) of one piece, from the sums of each digit.
template <int kDigits>
void add_piece(const std::int32_t* digit_sums, double input_sum, const float* scales,
               const std::int32_t* bases, double* totals) {
  constexpr double kDigitBase = 1 << kDigitBits;
  for (std::int64_t i = 0; i < kPanelRows; i += kDoubles) {
    F64 sum = load_doubles<HalfI32>(digit_sums + (kDigits - 1) * kPanelRows + i);
#pragma GCC unroll 4
    for (int digit = kDigits - 2; digit >= 0; --digit) {
      sum = sum * kDigitBase + load_doubles<HalfI32>(digit_sums + digit * kPanelRows + i);
    }
    sum = (sum - input_sum * load_doubles<HalfI32>(bases + i)) * load_doubles<HalfF32>(scales + i);
    sum += load_bits<F64>(totals + i);
    std::memcpy(totals + i, &sum, sizeof(sum));
  }
}

/// Takes the zero points of `rows` rows out of their sums, the last of which is that of ones.
void subtract_zero_points(const std::int32_t* zero_points, std::int64_t rows, std::int32_t* sums) {
  const std::int32_t* ones = sums + rows * kPanelRows;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t i = 0; i < kPanelRows; ++i) {
      sums[row * kPanelRows + i] -= zero_points[row] * ones[i];
    }
  }
}

using Dot = void (*)(const std::uint8_t*, std::int64_t, std::int64_t, const Prefetch&, const Digit*,
                     std::int32_t*);

template <int kPanels, int kBits, int... kVectorsMinusOne>
Dot dot_of(std::int64_t vectors, std::integer_sequence<int, kVectorsMinusOne...> /*sequence*/) {
  static constexpr Dot kDots[] = {dot<kBits, kVectorsMinusOne + 1, kPanels>...};
  return kDots[vectors - 1];
}

template <int kPanels>
Dot find_dot(std::int64_t bits, std::int64_t vectors) {
  constexpr std::make_integer_sequence<int, kPanels == 1 ? kMaxVectors : kPairVectors> kVectors;
  return bits == 8   ? dot_of<kPanels, 8>(vectors, kVectors)
         : bits == 4 ? dot_of<kPanels, 4>(vectors, kVectors)
                     : dot_of<kPanels, 2>(vectors, kVectors);
}

/// A tile of rows.
struct Tile {
  std::int64_t index;
  std::int64_t first_row;
  std::int64_t rows;
  std::int64_t tiles_left;  ///< that come after this one with the same panel
  std::int64_t tiles;       ///< in all
};

/// What to ask for while `blocks` blocks at `weight` are multiplied. A single tile reads the weight
/// from memory itself, and asks some way ahead: hardware prefetchers stop at page boundaries. Of
/// several tiles the last ones ask for the next panel, while their own is in the cache.
Prefetch prefetch_of(const Tile& tile, const std::uint8_t* weight, std::int64_t blocks,
                     std::int64_t panel_bytes, std::int64_t vectors) {
  if (tile.tiles == 1) {
    const std::uint8_t* ahead = weight + (vectors > 4 ? 4096 : 1024);
    return {.first = ahead, .second = ahead + kBlockBytes / 2, .step = kBlockBytes};
  }
  const std::int64_t askers = tile.tiles >= 4 ? 4 : 2;
  if (tile.tiles_left >= askers) {
    return {.first = weight, .second = weight, .step = 0};
  }
  const std::int64_t run = blocks * kBlockBytes / (2 * askers);
  const std::uint8_t* first = weight + panel_bytes + 2 * run * tile.tiles_left;
  return {.first = first, .second = first + run, .step = kBlockBytes / (2 * askers)};
}

/// A tile of rows times kPanels panels.
template <int kDigits, int kPanels>
void multiply_tile(const IntegerMultiplyArgs& args, const IntegerLayout& layout, Tile tile,
                   std::int64_t first_panel) {
  constexpr std::int64_t kRows = (kPanels == 1 ? kMaxVectors : kPairVectors) / kDigits;
  const std::int64_t ones = ones_of(args.mode);
  const std::int64_t vectors = tile.rows * kDigits + ones;
  const std::uint8_t* panel = args.weight + first_panel * layout.panel_bytes;
  const std::uint8_t* blocks = panel;
  const Digit* input = reinterpret_cast<const Digit*>(args.input.digits) +
                       (tile.first_row * kDigits + tile.index * ones) * layout.padded_cols;
  const double* input_sums = args.input.sums + tile.first_row * layout.pieces;
  const Dot dot_piece = find_dot<kPanels>(layout.bits, vectors);
  std::int32_t offsets[kPanelRows];
  for (std::int32_t& offset : offsets) {
    offset = static_cast<std::int32_t>(layout.offset);
  }
  for (int i = 0; i < kPanels; ++i) {
    ask_for_rows(args.output, tile.first_row, tile.rows, first_panel + i);
  }
  alignas(64) double totals[kPanels][kRows][kPanelRows] = {};
  alignas(64) std::int32_t sums[kPanels * kRows * kDigits * kPanelRows];
  for (std::int64_t group = 0; group < layout.groups; ++group) {
    for (std::int64_t done = 0; done < layout.blocks_per_group; done += layout.piece_blocks) {
      const std::int64_t left = layout.blocks_per_group - done;
      const std::int64_t count = left < layout.piece_blocks ? left : layout.piece_blocks;
      dot_piece(blocks, layout.panel_bytes, count,
                prefetch_of(tile, blocks, count, layout.panel_bytes, vectors), input, sums);
      for (int i = 0; i < kPanels && ones > 0; ++i) {
        subtract_zero_points(args.input.zero_points + tile.first_row, tile.rows,
                             sums + i * vectors * kPanelRows);
      }
      for (int i = 0; i < kPanels; ++i) {
        const std::uint8_t* end = panel + i * layout.panel_bytes;
        const auto* scales = reinterpret_cast<const float*>(end + layout.scales_offset);
        const auto* bases = reinterpret_cast<const std::int32_t*>(end + layout.bases_offset);
        for (std::int64_t row = 0; row < tile.rows; ++row) {
          add_piece<kDigits>(sums + (i * vectors + row * kDigits) * kPanelRows,
                             input_sums[row * layout.pieces], scales + group * kPanelRows,
                             layout.asymmetric ? bases + group * kPanelRows : offsets,
                             totals[i][row]);
        }
      }
      blocks += count * kBlockBytes;
      input += count * layout.block_cols * vectors;
      ++input_sums;
    }
  }
  for (int i = 0; i < kPanels; ++i) {
    for (std::int64_t row = 0; row < tile.rows; ++row) {
      store_row(args.output, tile.first_row + row, first_panel + i, totals[i][row],
                args.input.units[tile.first_row + row]);
    }
  }
}

template <int kDigits>
void multiply(const IntegerMultiplyArgs& args, const IntegerLayout& layout, const Part& part) {
  const OutputRows& output = args.output;
  std::int64_t panel = part.first_panel;
  if constexpr (kPairVectors >= kDigits) {
    if (output.rows * kDigits + ones_of(args.mode) <= kPairVectors) {
      for (; panel + 2 <= part.last_panel; panel += 2) {
        multiply_tile<kDigits, 2>(args, layout, {0, 0, output.rows, 0, 1}, panel);
      }
    }
  }
  // A panel stays in the second-level cache while every tile of the input passes by.
  for (; panel < part.last_panel; ++panel) {
    for (std::int64_t tile = part.first_tile; tile < part.last_tile; ++tile) {
      const std::int64_t row = tile_begin(tile, output.rows, output.tiles);
      const std::int64_t rows = tile_begin(tile + 1, output.rows, output.tiles) - row;
      multiply_tile<kDigits, 1>(
          args, layout,
          {tile, row, rows, part.last_tile - 1 - tile, part.last_tile - part.first_tile}, panel);
    }
  }
}

}  // namespace

DigitFormat digit_format(InputMode mode) {
  const std::int64_t digits = mode == InputMode::kFloat32 ? kDigitsOfExact : 1;
  return {digits, ones_of(mode), sizeof(Digit), (kMaxVectors - ones_of(mode)) / digits};
}

void split_rows(const SplitArgs& args, const IntegerLayout& layout) {
  const bool exact = args.rounding.mode == InputMode::kFloat32;
  const bool has_ones = ones_of(args.rounding.mode) > 0;
  const std::int64_t digits = exact ? kDigitsOfExact : 1;
  const std::int64_t stride = (args.rows * digits + (has_ones ? 1 : 0)) * kStepCols;
  auto* tile = reinterpret_cast<Digit*>(args.output.digits);
  for (std::int64_t row = 0; row < args.rows; ++row) {
    const float* input = args.input + row * args.input_stride;
    const InputGrid grid = input_grid(args, row, layout.groups * layout.group_size);
    args.output.units[row] = grid.unit;
    Digit* vectors = tile + row * digits * kStepCols;
    double* sums = args.output.sums + row * layout.pieces;
    if (exact) {
      split_row<kDigitsOfExact, false>(input, grid, layout, stride, vectors, sums);
    } else if (has_ones) {
      args.output.zero_points[row] = grid.zero_point;
      split_row<1, true>(input, grid, layout, stride, vectors, sums);
    } else {
      split_row<1, false>(input, grid, layout, stride, vectors, sums);
    }
  }
  if (has_ones) {
    write_ones(layout, stride, tile + args.rows * kStepCols);
  }
}

void multiply_integers(const IntegerMultiplyArgs& args, const IntegerLayout& layout,
                       const Part& part) {
  if (args.mode == InputMode::kFloat32) {
    multiply<kDigitsOfExact>(args, layout, part);
  } else {
    multiply<1>(args, layout, part);
  }
}

}  // namespace moq::kernels::cpu::MOQ_ISA
