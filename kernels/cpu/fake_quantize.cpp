// Cuts a multi-tensor fake-quantize into ranges of rows that threads share evenly, and hands each
// to the active instruction set in one of its two storages; any other storage is staged through a
// copy.
#include "kernels/fake_quantize.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/parallel.h"
#include "kernels/common/visit.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/fake_quantize.h"

namespace moq::kernels::cpu {
namespace {

/// Elements of one unit of work: long enough that handing it out costs nothing, short enough that
/// threads finish together.
constexpr std::int64_t kUnitElements = 64 * 1024;

/// Rows of a unit when columns are contiguous, so that memory is still read in long pieces.
constexpr std::int64_t kUnitLanes = 256;

/// Outputs of at least this many bytes in one call are stored past the caches: they would push out
/// of them what comes next, and a streaming store does not first read the line it overwrites.
constexpr std::int64_t kStreamBytes = 8 * 1024 * 1024;

bool rows_are_contiguous(const FakeQuantizeTensor& matrix) {
  return matrix.col_stride == 1 || matrix.cols == 1;
}

bool columns_are_contiguous(const FakeQuantizeTensor& matrix) {
  return matrix.row_stride == 1 || matrix.rows == 1;
}

/// Neither: the instruction sets get a contiguous copy.
bool is_staged(const FakeQuantizeTensor& matrix) {
  return !rows_are_contiguous(matrix) && !columns_are_contiguous(matrix);
}

/// A range of one matrix's rows; rows that share a scale with others share it with all of these.
struct Unit {
  std::size_t tensor;
  std::int64_t begin;
  std::int64_t end;
};

template <typename Element>
void advance(Element*& pointer, std::int64_t elements) {
  if (pointer != nullptr) {
    pointer += elements;
  }
}

template <typename Void>
void advance(Void*& pointer, std::int64_t elements, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  if (pointer != nullptr) {
    pointer = static_cast<Byte*>(pointer) + elements * static_cast<std::int64_t>(size_of(dtype));
  }
}

/// The rows [begin, end) of a matrix, as a matrix.
FakeQuantizeTensor rows_of(FakeQuantizeTensor matrix, std::int64_t begin, std::int64_t end) {
  // Scales that rows share are stored elsewhere.
  const std::int64_t first_group = rows_share_scales(matrix) ? 0 : begin * groups_per_row(matrix);
  advance(matrix.input, begin * matrix.row_stride, matrix.input_dtype);
  advance(matrix.output, begin * matrix.row_stride, matrix.output_dtype);
  advance(matrix.codes, begin * matrix.cols, matrix.codes_dtype);
  advance(matrix.scales, first_group, matrix.scale_dtype);
  advance(matrix.zero_points, first_group);
  advance(matrix.given_absmax, first_group);
  matrix.unsharded_cols = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
  matrix.first_element += begin * matrix.unsharded_cols;
  matrix.rows = end - begin;
  return matrix;
}

std::vector<Unit> units_of(std::span<const FakeQuantizeTensor> tensors) {
  std::vector<Unit> units;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const FakeQuantizeTensor& matrix = tensors[i];
    std::int64_t rows = kUnitElements / std::max<std::int64_t>(matrix.cols, 1);
    rows = std::max<std::int64_t>(rows, 1);
    if (!rows_are_contiguous(matrix) && columns_are_contiguous(matrix)) {
      rows = std::max(kUnitLanes, rows / kUnitLanes * kUnitLanes);
    }
    const std::int64_t share = rows_share_scales(matrix) ? rows_per_group(matrix) : matrix.rows;
    for (std::int64_t begin = 0; begin < matrix.rows;) {
      const std::int64_t share_end = (begin / share + 1) * share;
      const std::int64_t end = std::min({begin + rows, matrix.rows, share_end});
      units.push_back({i, begin, end});
      begin = end;
    }
  }
  return units;
}

/// Copies a matrix of `element_size`-byte elements from one pair of strides to another.
void copy_strided(const std::byte* input, std::int64_t input_row_stride,
                  std::int64_t input_col_stride, std::byte* output, std::int64_t output_row_stride,
                  std::int64_t output_col_stride, std::int64_t rows, std::int64_t cols,
                  std::int64_t element_size) {
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t col = 0; col < cols; ++col) {
      std::memcpy(output + (row * output_row_stride + col * output_col_stride) * element_size,
                  input + (row * input_row_stride + col * input_col_stride) * element_size,
                  static_cast<std::size_t>(element_size));
    }
  }
}

/// Calls body(matrix with contiguous rows) for a matrix whose rows and columns are both scattered.
template <typename Body>
void staged(const FakeQuantizeTensor& matrix, const Body& body) {
  const auto input_size = static_cast<std::int64_t>(size_of(matrix.input_dtype));
  const auto output_size = static_cast<std::int64_t>(size_of(matrix.output_dtype));
  std::vector<std::byte> input(static_cast<std::size_t>(matrix.rows * matrix.cols * input_size));
  std::vector<std::byte> output(
      matrix.output != nullptr ? static_cast<std::size_t>(matrix.rows * matrix.cols * output_size)
                               : 0);
  copy_strided(static_cast<const std::byte*>(matrix.input), matrix.row_stride, matrix.col_stride,
               input.data(), matrix.cols, 1, matrix.rows, matrix.cols, input_size);
  FakeQuantizeTensor contiguous = matrix;
  contiguous.input = input.data();
  contiguous.output = matrix.output != nullptr ? output.data() : nullptr;
  contiguous.row_stride = matrix.cols;
  contiguous.col_stride = 1;
  body(contiguous);
  if (matrix.output != nullptr) {
    copy_strided(output.data(), matrix.cols, 1, static_cast<std::byte*>(matrix.output),
                 matrix.row_stride, matrix.col_stride, matrix.rows, matrix.cols, output_size);
  }
}

/// The same elements with the names of rows and columns exchanged: for work that treats all alike.
FakeQuantizeTensor transposed(FakeQuantizeTensor matrix) {
  std::swap(matrix.rows, matrix.cols);
  std::swap(matrix.row_stride, matrix.col_stride);
  return matrix;
}

/// Calls body(matrix with contiguous rows) for work that treats all elements alike.
template <typename Body>
void in_any_order(const FakeQuantizeTensor& matrix, const Body& body) {
  if (rows_are_contiguous(matrix)) {
    body(matrix);
  } else if (columns_are_contiguous(matrix)) {
    body(transposed(matrix));
  } else {
    staged(matrix, body);
  }
}

GroupStatistics statistics_of_unit(FakeQuantizeTensor matrix) {
  matrix.output = nullptr;  // or staging would write it, and it may be the input
  GroupStatistics statistics;
  in_any_order(matrix, [&](const FakeQuantizeTensor& rows) {
    statistics = MOQ_DISPATCH_ISA(matrix_statistics, rows);
  });
  return statistics;
}

SweepSums sums_of_unit(FakeQuantizeTensor matrix, const Sweep& sweep) {
  matrix.output = nullptr;
  SweepSums sums;
  in_any_order(matrix, [&](const FakeQuantizeTensor& rows) {
    sums = MOQ_DISPATCH_ISA(matrix_sums, rows, sweep);
  });
  return sums;
}

void copy_unit(const FakeQuantizeTensor& matrix, bool stream) {
  if (matrix.output == nullptr ||
      (matrix.output == matrix.input && matrix.output_dtype == matrix.input_dtype)) {
    return;
  }
  in_any_order(matrix,
               [&](const FakeQuantizeTensor& rows) { MOQ_DISPATCH_ISA(copy_rows, rows, stream); });
}

void fake_quantize_unit(const FakeQuantizeTensor& matrix, const FakeQuantizeStep& step) {
  if (rows_are_contiguous(matrix)) {
    MOQ_DISPATCH_ISA(fake_quantize_rows, matrix, step);
  } else if (columns_are_contiguous(matrix)) {
    MOQ_DISPATCH_ISA(fake_quantize_columns, matrix, step);
  } else {
    staged(matrix, [&](const FakeQuantizeTensor& contiguous) {
      MOQ_DISPATCH_ISA(fake_quantize_rows, contiguous, step);
    });
  }
}

/// Finds the grids that rows share, and writes their scales and zero points.
class SharedGrids {
 public:
  SharedGrids(const FakeQuantizeArgs& args, std::span<const Unit> units)
      : args_(args), units_(units) {
    std::int64_t groups = 0;
    for (std::size_t i = 0; i < args.tensors.size(); ++i) {
      first_group_.push_back(groups);
      const bool shared = rows_share_scales(args.tensors[i]) && args.num_bits[i] != 0;
      groups += shared ? num_groups(args.tensors[i]) : 0;
    }
    first_group_.push_back(groups);
    if (groups != 0) {
      find();
    }
  }

  /// The grid of a unit's rows; null if they share none.
  const GridParams* of(const Unit& unit) const {
    return shares(unit.tensor) ? &grids_[group_of(unit)] : nullptr;
  }

 private:
  bool shares(std::size_t tensor) const { return first_group_[tensor] != first_group_[tensor + 1]; }
  std::size_t group_of(const Unit& unit) const {
    return static_cast<std::size_t>(first_group_[unit.tensor] +
                                    unit.begin / rows_per_group(args_.tensors[unit.tensor]));
  }
  GridSpec spec_of(std::size_t tensor) const {
    const FakeQuantizeTensor& matrix = args_.tensors[tensor];
    return {args_.num_bits[tensor], matrix.mode, matrix.scale_rule, matrix.scale_dtype};
  }

  /// Calls part(unit, its rows) for the units that share grids and `wanted`, on all threads, and
  /// merge(its group, what that gave) in the order of the units.
  template <typename Wanted, typename Part, typename Merge>
  void for_each_unit(const Wanted& wanted, const Part& part, const Merge& merge) const {
    std::vector<decltype(part(units_[0], FakeQuantizeTensor{}))> parts(units_.size());
    const auto takes_part = [&](const Unit& unit) {
      return shares(unit.tensor) && wanted(unit.tensor);
    };
    parallel_for(static_cast<std::int64_t>(units_.size()), 1,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) {
                     const Unit& unit = units_[static_cast<std::size_t>(i)];
                     if (takes_part(unit)) {
                       parts[static_cast<std::size_t>(i)] =
                           part(unit, rows_of(args_.tensors[unit.tensor], unit.begin, unit.end));
                     }
                   }
                 });
    for (std::size_t i = 0; i < units_.size(); ++i) {
      if (takes_part(units_[i])) {
        merge(group_of(units_[i]), parts[i]);
      }
    }
  }

  std::vector<GroupStatistics> statistics() const {
    std::vector<GroupStatistics> all(static_cast<std::size_t>(first_group_.back()));
    for_each_unit(
        [&](std::size_t tensor) { return args_.tensors[tensor].scale_rule != ScaleRule::kGiven; },
        [](const Unit&, const FakeQuantizeTensor& rows) { return statistics_of_unit(rows); },
        [&](std::size_t group, const GroupStatistics& part) {
          all[group].lowest = std::min(all[group].lowest, part.lowest);
          all[group].highest = std::max(all[group].highest, part.highest);
        });
    for_each_group([&](std::size_t tensor, std::int64_t within, std::size_t group) {
      if (args_.tensors[tensor].scale_rule == ScaleRule::kGiven) {
        all[group] = given_statistics(args_.tensors[tensor], within);
      }
    });
    return all;
  }

  /// Calls body(tensor, number of the group within it, number of the group among all).
  template <typename Body>
  void for_each_group(const Body& body) const {
    for (std::size_t tensor = 0; tensor + 1 < first_group_.size(); ++tensor) {
      for (std::int64_t group = first_group_[tensor]; group < first_group_[tensor + 1]; ++group) {
        body(tensor, group - first_group_[tensor], static_cast<std::size_t>(group));
      }
    }
  }

  void find() {
    const std::vector<GroupStatistics> extents = statistics();
    std::vector<GridSearch> searches(extents.size());
    int sweeps = 0;
    for_each_group([&](std::size_t tensor, std::int64_t, std::size_t group) {
      searches[group] = {extents[group], spec_of(tensor)};
      sweeps = std::max(sweeps, num_sweeps(spec_of(tensor)));
    });
    for (int sweep = 0; sweep < sweeps; ++sweep) {
      std::vector<SweepSums> sums(extents.size());
      const auto wanted = [&](std::size_t tensor) { return sweep < num_sweeps(spec_of(tensor)); };
      for_each_unit(
          wanted,
          [&](const Unit& unit, const FakeQuantizeTensor& rows) {
            return sums_of_unit(rows, searches[group_of(unit)].sweep(sweep));
          },
          [&](std::size_t group, const SweepSums& part) {
            sums[group].sum += part.sum;
            sums[group].count += part.count;
          });
      for_each_group([&](std::size_t tensor, std::int64_t, std::size_t group) {
        if (wanted(tensor)) {
          searches[group].take(sweep, sums[group]);
        }
      });
    }
    grids_.resize(extents.size());
    for_each_group([&](std::size_t tensor, std::int64_t within, std::size_t group) {
      grids_[group] = searches[group].grid();
      store(args_.tensors[tensor], grids_[group], within);
    });
  }

  static void store(const FakeQuantizeTensor& matrix, const GridParams& grid, std::int64_t group) {
    if (matrix.scales != nullptr) {
      visit_float(matrix.scale_dtype, [&]<typename Scale>(Scale) {
        store_float(static_cast<Scale*>(matrix.scales) + group, grid.scale);
      });
    }
    if (matrix.zero_points != nullptr) {
      matrix.zero_points[group] = grid.zero_point;
    }
  }

  const FakeQuantizeArgs& args_;
  std::span<const Unit> units_;
  std::vector<std::int64_t> first_group_;  // of each tensor among all; then the number of all
  std::vector<GridParams> grids_;
};

bool streams(std::span<const FakeQuantizeTensor> tensors) {
  std::int64_t bytes = 0;
  for (const FakeQuantizeTensor& matrix : tensors) {
    if (matrix.output != nullptr) {
      bytes += matrix.rows * matrix.cols * static_cast<std::int64_t>(size_of(matrix.output_dtype));
    }
  }
  return bytes >= kStreamBytes;
}

void check(const FakeQuantizeTensor& matrix, int num_bits, float blend_ratio, std::size_t i) {
  check_fake_quantize_tensor(matrix, i);
  MOQ_CHECK(num_bits == 0 || (num_bits >= min_bits(matrix.mode) && num_bits <= kMaxBits),
            "fake_quantize: num_bits of tensor ", i, " must be 0 or in [", min_bits(matrix.mode),
            ", ", kMaxBits, "], got ", num_bits);
  MOQ_CHECK(matrix.codes == nullptr || matrix.codes_dtype == DType::kInt16 || num_bits <= 8,
            "fake_quantize: int8 codes of tensor ", i, " need num_bits <= 8, got ", num_bits);
  MOQ_CHECK(blend_ratio >= 0.0F && blend_ratio <= 1.0F, "fake_quantize: blend_ratio of tensor ", i,
            " must be in [0, 1], got ", blend_ratio);
}

}  // namespace

void fake_quantize(const FakeQuantizeArgs& args) {
  const auto blend_ratio = [&](std::size_t i) {
    return args.blend_ratio != nullptr ? args.blend_ratio[i] : 0.0F;
  };
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    check(args.tensors[i], args.num_bits[i], blend_ratio(i), i);
  }
  if (args.skip != nullptr && *args.skip != 0.0F) {
    return;
  }
  const std::vector<Unit> units = units_of(args.tensors);
  const SharedGrids shared_grids(args, units);
  const bool stream = streams(args.tensors);
  const auto step = static_cast<std::uint32_t>(args.step != nullptr ? *args.step : 0);
  parallel_for(
      static_cast<std::int64_t>(units.size()), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const auto [tensor, first_row, end_row] = units[i];
          const FakeQuantizeTensor matrix = rows_of(args.tensors[tensor], first_row, end_row);
          // What is read again at once stays in the caches: an input, a staged copy.
          const bool past_caches = stream && matrix.output != matrix.input && !is_staged(matrix);
          if (args.num_bits[tensor] == 0) {
            copy_unit(matrix, past_caches);
            continue;
          }
          fake_quantize_unit(matrix, {.num_bits = args.num_bits[tensor],
                                      .blend_ratio = blend_ratio(tensor),
                                      .seed = args.seed,
                                      .step = step,
                                      .stream = past_caches,
                                      .shared_grid = shared_grids.of(units[i])});
        }
      });
}

}  // namespace moq::kernels::cpu
