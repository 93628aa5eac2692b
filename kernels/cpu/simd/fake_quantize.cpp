// Fake-quantize of a range of rows, in the two storages that weights have: contiguous rows (torch's
// Linear), where a group is a run of memory, and contiguous columns (Hugging Face's Conv1D), where
// neighbouring elements belong to neighbouring groups and vectors hold one element of each of many
// groups. Both go through their elements twice, once for the statistics and once to quantize; the
// work is cut so that the second time finds them in a cache.
#include "kernels/cpu/simd/fake_quantize.h"

#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/visit.h"
#include "kernels/cpu/simd/elementwise.h"
#include "kernels/cpu/simd/group_grids.h"
#include "kernels/cpu/simd/random_words.h"
#include "kernels/cpu/simd/statistics.h"
#include "kernels/cpu/simd/sweeps.h"

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

/// Bytes of input whose statistics are taken before any of it is quantized: what a core's own
/// caches hold beside the output.
constexpr std::int64_t kCachedBytes = 256 * 1024;

/// Elements whose random words are made at a time.
constexpr std::int64_t kDraws = 1024;

std::int64_t min_of(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
std::int64_t max_of(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}

template <typename Element>
Element* offset(Element* pointer, std::int64_t elements) {
  return pointer == nullptr ? nullptr : pointer + elements;
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

  RandomStream stream() const { return {step.seed, step.step, matrix.name_hash}; }
  bool stochastic() const { return matrix.rounding == Rounding::kStochastic; }
  Run run_of(std::int64_t size) const {
    return {size, nullptr, step.blend_ratio, has_sign_codes(matrix.mode, step.num_bits)};
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
void store_parameters(const FakeQuantizeTensor& matrix, const GroupGrids& grids, int i,
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
void store_codes(const FakeQuantizeTensor& matrix, const Input* input, std::int64_t row,
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
void store_output(const FakeQuantizeStep& step, const Input* input, Output* output,
                  const Grids& grids, const Run& run) {
  const bool plain = run.random_words == nullptr && run.blend_ratio == 0.0F && !run.sign_codes;
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

// ------------------------------------------------------------------------------- contiguous rows

/// Quantizes `size` elements of one group, from (row, col) on, along the row.
template <typename TypedMatrix>
void quantize_group(const TypedMatrix& typed, std::int64_t row, std::int64_t col, std::int64_t size,
                    const SharedGrid& grid) {
  const FakeQuantizeTensor& matrix = typed.matrix;
  std::uint32_t words[random_words_capacity(kDraws) + kWidth];
  const std::int64_t run_size = typed.stochastic() ? kDraws : size;
  for (std::int64_t begin = col; begin < col + size; begin += run_size) {
    Run run = typed.run_of(min_of(run_size, col + size - begin));
    if (typed.stochastic()) {
      run.random_words = random_words(typed.stream(), typed.number_of(row, begin), run.size, words);
    }
    const std::int64_t place = row * matrix.row_stride + begin;
    if (matrix.codes != nullptr) {
      store_codes(matrix, typed.input + place, row, begin, grid, run);
    }
    if (matrix.output != nullptr) {
      store_output(typed.step, typed.input + place, typed.output + place, grid, run);
    }
  }
}

template <typename Element>
GroupStatistics statistics_in(QuantMode mode, const Element* input, std::int64_t size) {
  return is_symmetric(mode) ? statistics_of<QuantMode::kSymmetric>(input, size)
                            : statistics_of<QuantMode::kAsymmetric>(input, size);
}

/// Groups are taken in batches: enough for one vector of grids, few enough to stay in a cache.
template <typename TypedMatrix>
void fake_quantize_typed_rows(const TypedMatrix& typed) {
  const FakeQuantizeTensor& matrix = typed.matrix;
  const FakeQuantizeStep& step = typed.step;
  const std::int64_t group_size = columns_per_group(matrix);
  const std::int64_t row_groups = groups_per_row(matrix);
  const std::int64_t num_groups = matrix.rows * row_groups;
  const auto group_bytes = group_size * static_cast<std::int64_t>(sizeof(*typed.input));
  const std::int64_t batch =
      group_bytes == 0 ? 1 : max_of(1, min_of(16, kCachedBytes / group_bytes));
  const GridSpec spec = typed.grid_spec();
  GroupStatisticsArrays statistics;
  GroupGrids grids;
  for (std::int64_t first = 0; first < num_groups; first += batch) {
    const auto count = static_cast<int>(min_of(batch, num_groups - first));
    const auto group_at = [&](int i) {
      return typed.input + (first + i) / row_groups * matrix.row_stride +
             (first + i) % row_groups * group_size;
    };
    for (int i = 0; i < count && step.shared_grid == nullptr; ++i) {
      const GroupStatistics group = matrix.scale_rule == ScaleRule::kGiven
                                        ? given_statistics(matrix, first + i)
                                        : statistics_in(matrix.mode, group_at(i), group_size);
      statistics.lowest[i] = group.lowest;
      statistics.highest[i] = group.highest;
    }
    if (step.shared_grid != nullptr) {
      for (int i = 0; i < count; ++i) {
        grids.set(i, *step.shared_grid);
      }
    } else if (num_sweeps(spec) == 0) {
      make_grids(statistics, count, step.num_bits, matrix.mode, matrix.scale_dtype, grids);
    } else {
      for (int i = 0; i < count; ++i) {
        GridSearch search({statistics.lowest[i], statistics.highest[i]}, spec);
        for (int sweep = 0; sweep < num_sweeps(spec); ++sweep) {
          search.take(sweep, sweep_run(group_at(i), group_size, search.sweep(sweep)));
        }
        grids.set(i, search.grid());
      }
    }
    for (int i = 0; i < count; ++i) {
      const std::int64_t row = (first + i) / row_groups;
      const std::int64_t col = (first + i) % row_groups * group_size;
      if (step.shared_grid == nullptr) {
        store_parameters(matrix, grids, i, first + i);
      }
      quantize_group(typed, row, col, group_size, SharedGrid(grids, i));
    }
  }
}

// ---------------------------------------------------------------------------- contiguous columns

/// Statistics of `lanes` neighbouring rows over the columns [begin, end).
template <QuantMode kMode, typename Input>
void lane_statistics(const Input* input, std::int64_t col_stride, std::int64_t begin,
                     std::int64_t end, std::int64_t lanes, GroupStatisticsArrays& statistics) {
  statistics = {};
  for (std::int64_t col = begin; col < end; ++col) {
    for_each_vector<false>(input, lanes, [&](std::int64_t i, std::int64_t count) MOQ_INLINE_LAMBDA {
      const I32 bits = bit_cast<I32>(load_some(input + col * col_stride + i, count));
      const I32 highest = load_bits<I32>(statistics.highest + i);
      if constexpr (kMode == QuantMode::kSymmetric) {
        const I32 larger = maximum(highest, bits & kMagnitudeMask);
        std::memcpy(statistics.highest + i, &larger, sizeof(larger));
      } else {
        const I32 ordered = ordered_lanes(bits);
        const I32 larger = maximum(highest, ordered);
        const I32 smaller = minimum(load_bits<I32>(statistics.lowest + i), ordered);
        std::memcpy(statistics.highest + i, &larger, sizeof(larger));
        std::memcpy(statistics.lowest + i, &smaller, sizeof(smaller));
      }
    });
  }
}

/// Random words of a tile, laid out as the tile is in memory: kColumns columns of `lanes` rows.
struct TileWords {
  static constexpr std::int64_t kColumns = 32;
  static constexpr std::int64_t kLanes = 64;
  std::uint32_t words[kColumns * kLanes + kWidth];

  template <typename TypedMatrix>
  void fill(const TypedMatrix& typed, std::int64_t first_row, std::int64_t first_col,
            std::int64_t lanes, std::int64_t columns) {
    std::uint32_t row_words[random_words_capacity(kColumns)];
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const std::uint32_t* source = random_words(
          typed.stream(), typed.number_of(first_row + lane, first_col), columns, row_words);
      for (std::int64_t col = 0; col < columns; ++col) {
        words[col * kLanes + lane] = source[col];
      }
    }
  }
};

/// Codes of one column of a tile, scattered to their rows: codes are contiguous along them.
template <typename Input>
void store_column_codes(const FakeQuantizeTensor& matrix, const Input* input, std::int64_t row,
                        std::int64_t col, const LaneGrids& grids, const Run& run) {
  std::int16_t column[GroupGrids::kCapacity];
  quantize_run(input, column, grids, run);
  for (std::int64_t lane = 0; lane < run.size; ++lane) {
    const std::int64_t place = (row + lane) * matrix.cols + col;
    if (matrix.codes_dtype == DType::kInt8) {
      static_cast<std::int8_t*>(matrix.codes)[place] = static_cast<std::int8_t>(column[lane]);
    } else {
      static_cast<std::int16_t*>(matrix.codes)[place] = column[lane];
    }
  }
}

/// Quantizes `lanes` rows from `row` on over the columns [begin, end).
template <typename TypedMatrix>
void quantize_lanes(const TypedMatrix& typed, std::int64_t row, std::int64_t lanes,
                    std::int64_t begin, std::int64_t end, const LaneGrids& grids) {
  const FakeQuantizeTensor& matrix = typed.matrix;
  TileWords tile;
  for (std::int64_t col = begin; col < end; ++col) {
    Run run = typed.run_of(lanes);
    if (typed.stochastic()) {
      const std::int64_t tile_col = (col - begin) % TileWords::kColumns;
      if (tile_col == 0) {
        tile.fill(typed, row, col, lanes, min_of(TileWords::kColumns, end - col));
      }
      run.random_words = tile.words + tile_col * TileWords::kLanes;
    }
    const std::int64_t place = col * matrix.col_stride + row;
    if (matrix.codes != nullptr) {
      store_column_codes(matrix, typed.input + place, row, col, grids, run);
    }
    if (matrix.output != nullptr) {
      store_output(typed.step, typed.input + place, typed.output + place, grids, run);
    }
  }
}

/// Grids of `lanes` neighbouring rows, one group each: that of the columns [begin, end).
template <typename TypedMatrix>
void make_lane_grids(const TypedMatrix& typed, std::int64_t row, std::int64_t lanes,
                     std::int64_t group, GroupGrids& grids) {
  const FakeQuantizeTensor& matrix = typed.matrix;
  const FakeQuantizeStep& step = typed.step;
  const std::int64_t begin = group * columns_per_group(matrix);
  const std::int64_t end = begin + columns_per_group(matrix);
  const auto* input = typed.input + row;
  GroupStatisticsArrays statistics;
  if (matrix.scale_rule == ScaleRule::kGiven) {
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      statistics.highest[lane] =
          given_statistics(matrix, (row + lane) * groups_per_row(matrix) + group).highest;
    }
  } else if (is_symmetric(matrix.mode)) {
    lane_statistics<QuantMode::kSymmetric>(input, matrix.col_stride, begin, end, lanes, statistics);
  } else {
    lane_statistics<QuantMode::kAsymmetric>(input, matrix.col_stride, begin, end, lanes,
                                            statistics);
  }
  const GridSpec spec = typed.grid_spec();
  const auto count = static_cast<int>(lanes);
  if (num_sweeps(spec) == 0) {
    make_grids(statistics, count, step.num_bits, matrix.mode, matrix.scale_dtype, grids);
    return;
  }
  GridSearch searches[GroupGrids::kCapacity];
  for (int lane = 0; lane < count; ++lane) {
    searches[lane] = {{statistics.lowest[lane], statistics.highest[lane]}, spec};
  }
  LaneSweeps sweeps;
  for (int sweep = 0; sweep < num_sweeps(spec); ++sweep) {
    SweepSums sums[GroupGrids::kCapacity] = {};
    for (int lane = 0; lane < count; ++lane) {
      sweeps.set(lane, searches[lane].sweep(sweep));
    }
    if (sweeps.squared_error) {
      sweep_columns<true>(input, matrix.col_stride, begin, end, lanes, sweeps, sums);
    } else {
      sweep_columns<false>(input, matrix.col_stride, begin, end, lanes, sweeps, sums);
    }
    for (int lane = 0; lane < count; ++lane) {
      searches[lane].take(sweep, sums[lane]);
    }
  }
  for (int lane = 0; lane < count; ++lane) {
    grids.set(lane, searches[lane].grid());
  }
}

template <typename TypedMatrix>
void fake_quantize_typed_columns(const TypedMatrix& typed) {
  const FakeQuantizeTensor& matrix = typed.matrix;
  const FakeQuantizeStep& step = typed.step;
  const std::int64_t group_size = columns_per_group(matrix);
  const std::int64_t row_groups = groups_per_row(matrix);
  const std::int64_t tile = typed.stochastic() ? TileWords::kLanes : GroupGrids::kCapacity;
  GroupGrids grids{};
  for (std::int64_t row = 0; row < matrix.rows; row += tile) {
    const std::int64_t lanes = min_of(tile, matrix.rows - row);
    for (std::int64_t group = 0; group < row_groups; ++group) {
      if (step.shared_grid == nullptr) {
        make_lane_grids(typed, row, lanes, group, grids);
      }
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        const auto i = static_cast<int>(lane);
        if (step.shared_grid != nullptr) {
          grids.set(i, *step.shared_grid);
        } else {
          store_parameters(matrix, grids, i, (row + lane) * row_groups + group);
        }
      }
      const std::int64_t begin = group * group_size;
      quantize_lanes(typed, row, lanes, begin, begin + group_size, LaneGrids(grids));
    }
  }
}

/// Calls body(Typed) with the matrix's element types.
template <typename Body>
void visit_typed(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step, const Body& body) {
  visit_float(matrix.input_dtype, [&]<typename Input>(Input) {
    visit_float(matrix.output_dtype, [&]<typename Output>(Output) {
      body(Typed<Input, Output>{matrix, step});
    });
  });
}

}  // namespace

void fake_quantize_rows(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step) {
  visit_typed(matrix, step, [](const auto& typed) { fake_quantize_typed_rows(typed); });
  fence_streams();
}

void fake_quantize_columns(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step) {
  visit_typed(matrix, step, [](const auto& typed) { fake_quantize_typed_columns(typed); });
  fence_streams();
}

GroupStatistics matrix_statistics(const FakeQuantizeTensor& matrix) {
  GroupStatistics all;
  visit_float(matrix.input_dtype, [&]<typename Input>(Input) {
    for (std::int64_t row = 0; row < matrix.rows; ++row) {
      const Input* input = static_cast<const Input*>(matrix.input) + row * matrix.row_stride;
      const GroupStatistics group = statistics_in(matrix.mode, input, matrix.cols);
      all.lowest = minimum(all.lowest, group.lowest);
      all.highest = maximum(all.highest, group.highest);
    }
  });
  return all;
}

SweepSums matrix_sums(const FakeQuantizeTensor& matrix, const Sweep& sweep) {
  SweepSums all;
  visit_float(matrix.input_dtype, [&]<typename Input>(Input) {
    for (std::int64_t row = 0; row < matrix.rows; ++row) {
      const Input* input = static_cast<const Input*>(matrix.input) + row * matrix.row_stride;
      const SweepSums sums = sweep_run(input, matrix.cols, sweep);
      all.sum += sums.sum;
      all.count += sums.count;
    }
  });
  return all;
}

void copy_rows(const FakeQuantizeTensor& matrix, bool stream) {
  visit_typed(matrix, FakeQuantizeStep{}, [&]<typename TypedMatrix>(const TypedMatrix& typed) {
    for (std::int64_t row = 0; row < matrix.rows; ++row) {
      const auto* input = typed.input + row * matrix.row_stride;
      auto* output = typed.output + row * matrix.row_stride;
      if (stream) {
        convert_run<true>(input, output, matrix.cols);
      } else {
        convert_run<false>(input, output, matrix.cols);
      }
    }
  });
  fence_streams();
}

}  // namespace moq::kernels::cpu::MOQ_ISA
