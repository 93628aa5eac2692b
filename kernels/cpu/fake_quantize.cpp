// Cuts a multi-tensor fake-quantize into ranges of rows that threads share evenly, and hands each
// to the active instruction set in one of its two storages; any other storage is staged through a
// copy.
#include "kernels/fake_quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/fake_quantize_check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/integer_math.h"
#include "kernels/common/parallel.h"
#include "kernels/common/visit.h"
#include "kernels/cpu/fake_quantize_units.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/simd/fake_quantize.h"

namespace moq::kernels::cpu {
namespace {

/// Units that a thread takes at a time, at most: several, because what is asked for at the end of a
/// unit is the start of the next; few, so that threads end together where one of them is disturbed,
/// as by torch's own threads, which spin for milliseconds after torch's last call.
constexpr std::int64_t kUnitsTaken = 16;

/// Calls body(i) for the units [0, size), on as many threads as there are takings: a worker that is
/// woken for nothing costs more than a small weight does.
template <typename Body>
void for_each_unit_index(std::int64_t size, const Body& body) {
  const std::int64_t threads = num_threads();
  const std::int64_t taken = std::clamp<std::int64_t>(size / (8 * threads), 1, kUnitsTaken);
  std::atomic<std::int64_t> next{0};
  parallel_for(std::min(threads, divide_up(size, taken)), 1, [&](std::int64_t, std::int64_t) {
    for (;;) {
      const std::int64_t begin = next.fetch_add(taken, std::memory_order_relaxed);
      if (begin >= size) {
        break;
      }
      for (std::int64_t i = begin; i < std::min(begin + taken, size); ++i) {
        body(static_cast<std::size_t>(i));
      }
    }
  });
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

/// Collects what the grids follow from that rows share.
class Collector {
 public:
  /// Of the tensors that are wanted; units of others are passed over.
  template <typename Wanted>
  Collector(const FakeQuantizeArgs& args, std::span<const Unit> units, const Wanted& wanted)
      : args_(args), units_(units) {
    std::int64_t groups = 0;
    for (std::size_t i = 0; i < args.tensors.size(); ++i) {
      first_group_.push_back(groups);
      const bool shared = rows_share_scales(args.tensors[i]) && args.num_bits[i] != 0;
      groups += shared && wanted(args.tensors[i]) ? num_groups(args.tensors[i]) : 0;
    }
    first_group_.push_back(groups);
    collections_.resize(static_cast<std::size_t>(groups));
  }

  bool shares(std::size_t tensor) const { return first_group_[tensor] != first_group_[tensor + 1]; }
  std::size_t group_of(const Unit& unit) const {
    return static_cast<std::size_t>(first_group_[unit.tensor] +
                                    unit.begin / rows_per_group(args_.tensors[unit.tensor]));
  }
  GroupCollection& collection(std::size_t group) { return collections_[group]; }

  /// Calls body(tensor, number of the group within it, number of the group among all).
  template <typename Body>
  void for_each_group(const Body& body) const {
    for (std::size_t tensor = 0; tensor + 1 < first_group_.size(); ++tensor) {
      for (std::int64_t group = first_group_[tensor]; group < first_group_[tensor + 1]; ++group) {
        body(tensor, group - first_group_[tensor], static_cast<std::size_t>(group));
      }
    }
  }

  /// One stage of collect_groups, for the tensors that are wanted.
  template <typename Wanted>
  void collect(int stage, const Wanted& wanted) {
    if (stage == 0) {
      collect_extents(wanted);
    } else {
      collect_sums(stage - 1, wanted);
    }
  }

  GridParams grid(std::size_t tensor, std::size_t group) const {
    const GridSpec spec = spec_of(tensor);
    GridSearch search(collections_[group].extent, spec);
    for (int i = 0; i < num_sweeps(spec); ++i) {
      search.take(i, collections_[group].sums[i]);
    }
    return search.grid();
  }

 private:
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
    for_each_unit_index(std::ssize(units_), [&](std::size_t i) {
      const Unit& unit = units_[i];
      if (takes_part(unit)) {
        parts[i] = part(unit, rows_of(args_.tensors[unit.tensor], unit.begin, unit.end));
      }
    });
    for (std::size_t i = 0; i < units_.size(); ++i) {
      if (takes_part(units_[i])) {
        merge(group_of(units_[i]), parts[i]);
      }
    }
  }

  template <typename Wanted>
  void collect_extents(const Wanted& wanted) {
    for_each_unit(
        [&](std::size_t tensor) {
          return args_.tensors[tensor].scale_rule != ScaleRule::kGiven &&
                 wanted(args_.tensors[tensor]);
        },
        [](const Unit&, const FakeQuantizeTensor& rows) { return statistics_of_unit(rows); },
        [&](std::size_t group, const GroupStatistics& part) {
          GroupStatistics& all = collections_[group].extent;
          all.lowest = std::min(all.lowest, part.lowest);
          all.highest = std::max(all.highest, part.highest);
        });
    for_each_group([&](std::size_t tensor, std::int64_t within, std::size_t group) {
      if (args_.tensors[tensor].scale_rule == ScaleRule::kGiven) {
        collections_[group].extent = given_statistics(args_.tensors[tensor], within);
      }
    });
  }

  template <typename Wanted>
  void collect_sums(int stage, const Wanted& wanted) {
    for (int sweep = 0; sweep < kMseCandidates; ++sweep) {
      const auto sweeps_now = [&](std::size_t tensor) {
        const GridSpec spec = spec_of(tensor);
        return sweep < num_sweeps(spec) && stage_of_sweep(spec, sweep) == stage &&
               wanted(args_.tensors[tensor]);
      };
      std::vector<Sweep> next(collections_.size());
      bool any = false;
      for_each_group([&](std::size_t tensor, std::int64_t, std::size_t group) {
        if (sweeps_now(tensor)) {
          any = true;
          GridSearch search(collections_[group].extent, spec_of(tensor));
          for (int i = 0; i < sweep && stage_of_sweep(spec_of(tensor), i) < stage; ++i) {
            search.take(i, collections_[group].sums[i]);
          }
          next[group] = search.sweep(sweep);
        }
      });
      if (!any) {
        continue;
      }
      for_each_unit(
          sweeps_now,
          [&](const Unit& unit, const FakeQuantizeTensor& rows) {
            return sums_of_unit(rows, next[group_of(unit)]);
          },
          [&](std::size_t group, const SweepSums& part) {
            collections_[group].sums[sweep].sum += part.sum;
            collections_[group].sums[sweep].count += part.count;
          });
    }
  }

  const FakeQuantizeArgs& args_;
  std::span<const Unit> units_;
  std::vector<std::int64_t> first_group_;  // of each tensor among all; then the number of all
  std::vector<GroupCollection> collections_;
};

/// Finds the grids that rows share, and writes their scales and zero points.
class SharedGrids {
 public:
  SharedGrids(const FakeQuantizeArgs& args, std::span<const Unit> units)
      : collector_(args, units, [](const FakeQuantizeTensor&) { return true; }) {
    const auto here = [](const FakeQuantizeTensor& matrix) { return matrix.collected == nullptr; };
    for (int stage = 0; stage < kCollectStages; ++stage) {
      collector_.collect(stage, here);
    }
    collector_.for_each_group([&](std::size_t tensor, std::int64_t within, std::size_t group) {
      const FakeQuantizeTensor& matrix = args.tensors[tensor];
      if (matrix.collected != nullptr) {
        collector_.collection(group) = matrix.collected[within];
      }
      grids_.push_back(collector_.grid(tensor, group));
      store(matrix, grids_.back(), within);
    });
  }

  /// The grid of a unit's rows; null if they share none.
  const GridParams* of(const Unit& unit) const {
    return collector_.shares(unit.tensor) ? &grids_[collector_.group_of(unit)] : nullptr;
  }

 private:
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

  Collector collector_;
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

void collect_groups(const FakeQuantizeArgs& args, int stage) {
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    check(args.tensors[i], args.num_bits[i], 0.0F, i);
  }
  if (args.skip != nullptr && *args.skip != 0.0F) {
    return;
  }
  const std::vector<Unit> units = units_of(args.tensors);
  const auto wanted = [](const FakeQuantizeTensor& matrix) { return matrix.collected != nullptr; };
  Collector collector(args, units, wanted);
  collector.for_each_group([&](std::size_t tensor, std::int64_t within, std::size_t group) {
    collector.collection(group) = args.tensors[tensor].collected[within];
  });
  collector.collect(stage, wanted);
  collector.for_each_group([&](std::size_t tensor, std::int64_t within, std::size_t group) {
    args.tensors[tensor].collected[within] = collector.collection(group);
  });
}

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
  for_each_unit_index(std::ssize(units), [&](std::size_t i) {
    const auto [tensor, first_row, end_row] = units[i];
    const FakeQuantizeTensor matrix = rows_of(args.tensors[tensor], first_row, end_row);
    // What is read again at once stays in the caches: an input, a staged copy.
    const bool past_caches = stream && matrix.output != matrix.input && !is_staged(matrix);
    if (args.num_bits[tensor] == 0) {
      copy_unit(matrix, past_caches);
      return;
    }
    fake_quantize_unit(matrix, {.num_bits = args.num_bits[tensor],
                                .blend_ratio = blend_ratio(tensor),
                                .seed = args.seed,
                                .step = step,
                                .stream = past_caches,
                                .shared_grid = shared_grids.of(units[i])});
  });
}

}  // namespace moq::kernels::cpu
