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
#include "kernels/cpu/simd/random_draws.h"
#include "kernels/cpu/simd/row_quantizer.h"
#include "kernels/cpu/simd/statistics.h"
#include "kernels/cpu/simd/sweeps.h"
#include "kernels/cpu/simd/typed_matrix.h"

namespace moq::kernels::cpu::MOQ_ISA {
namespace {

/// Bytes of input whose statistics are taken before any of it is quantized: what a core's own
/// caches hold beside the output.
constexpr std::int64_t kCachedBytes = 256 * 1024;

// ------------------------------------------------------------------------------- contiguous rows

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
  RowQuantizer quantizer(typed, batch * group_size);
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
      quantizer.quantize(row, col, group_size, SharedGrid(grids, i));
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

/// Draws of a tile, laid out as the tile is in memory: kColumns columns of `lanes` rows.
struct TileDraws {
  static constexpr std::int64_t kColumns = 32;
  static constexpr std::int64_t kLanes = 64;
  std::uint16_t draws[kColumns * kLanes + kWidth];

  template <typename TypedMatrix>
  void fill(const TypedMatrix& typed, std::int64_t first_row, std::int64_t first_col,
            std::int64_t lanes, std::int64_t columns) {
    std::uint16_t row_draws[RandomDraws::capacity(kColumns)];
    RandomDraws random_draws = typed.random_draws();
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
      const std::uint16_t* source =
          random_draws.draw(typed.number_of(first_row + lane, first_col), columns, row_draws);
      for (std::int64_t col = 0; col < columns; ++col) {
        draws[col * kLanes + lane] = source[col];
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
  TileDraws tile;
  for (std::int64_t col = begin; col < end; ++col) {
    Run run = typed.run_of(lanes, lanes);  // the rows that are taken next
    if (typed.draws()) {
      const std::int64_t tile_col = (col - begin) % TileDraws::kColumns;
      if (tile_col == 0) {
        tile.fill(typed, row, col, lanes, min_of(TileDraws::kColumns, end - col));
      }
      run.draws = tile.draws + tile_col * TileDraws::kLanes;
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
  const std::int64_t tile = typed.draws() ? TileDraws::kLanes : GroupGrids::kCapacity;
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
