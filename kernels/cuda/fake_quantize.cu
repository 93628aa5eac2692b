// Fake-quantize of many matrices in one launch, on CUDA.
//
// Memory-bound: a weight is read from device memory once (the second look at it hits the caches)
// and its simulated value is written once. fake_quantize_tiles.h deals the matrices to thread
// blocks; the arithmetic is quant_grid.h's, compiled without contraction (-fmad=false), and
// statistics are integer minima and maxima, so the bits do not depend on the order of anything and
// equal the CPU's.
#include <cuda_runtime.h>
#include <algorithm>

#include "kernels/common/fake_quantize_check.h"
#include "kernels/common/fake_quantize_layout.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/fake_quantize_elements.h"
#include "kernels/cuda/fake_quantize_groups.h"
#include "kernels/cuda/fake_quantize_table.h"
#include "kernels/cuda/fake_quantize_tiles.h"
#include "kernels/cuda/fake_quantize_vectors.h"
#include "kernels/cuda/launch.h"
#include "kernels/fake_quantize.h"
#include "kernels/quant_grid.h"

namespace moq::kernels::cuda {
namespace {

// ------------------------------------------------------------------------------------------ grids

/// Grid of a group with this extent; collect(i, sweep) gives the sums of sweep i. All threads of a
/// block make the same calls of it, whatever their groups hold. kSweeps: some matrix of the launch
/// may need sweeps; without, the usual launch keeps its registers.
template <bool kSweeps, typename Collect>
__device__ GridParams search_grid(const FakeQuantizeTensor& matrix, int num_bits,
                                  const GroupStatistics& extent, const Collect& collect) {
  if (!has_grid(matrix, num_bits)) {
    return no_grid();
  }
  if constexpr (!kSweeps) {
    return make_grid(extent, num_bits, matrix.mode, matrix.scale_dtype);
  }
  const GridSpec spec{num_bits, matrix.mode, matrix.scale_rule, matrix.scale_dtype};
  GridSearch search(extent, spec);
  for (int i = 0; i < num_sweeps(spec); ++i) {
    search.take(i, collect(i, search.sweep(i)));
  }
  return search.grid();
}

/// What is collected of a matrix's groups of several rows.
__device__ GroupCollection* slots_of(const Table& table, const Step& step, int tensor) {
  const FakeQuantizeTensor& matrix = table.tensors[tensor];
  return matrix.collected != nullptr ? matrix.collected : step.slots + table.first_slot[tensor];
}

/// Grid of a group that lies in one row. Every thread of the block takes part.
template <bool kSweeps>
__device__ GridParams grid_of_run(const FakeQuantizeTensor& matrix, const Tiling& tiling,
                                  const Place& place, int num_bits) {
  GroupStatistics extent;
  if (matrix.scale_rule == ScaleRule::kGiven) {
    if (place.active) {
      extent = given_statistics(matrix, place.row * tiling.runs_per_row + place.run);
    }
  } else {
    extent = reduce_team(tiling, place.active ? own_statistics(matrix, place) : GroupStatistics{});
  }
  return search_grid<kSweeps>(matrix, num_bits, extent, [&](int, const Sweep& sweep) {
    return reduce_team(tiling, place.active ? own_sums(matrix, place, sweep) : SweepSums{});
  });
}

/// Grid of a group of several rows, once everything of it is collected.
template <bool kSweeps>
__device__ GridParams grid_of_slot(const FakeQuantizeTensor& matrix, const GroupCollection* slots,
                                   std::int64_t group, int num_bits) {
  const GroupStatistics extent = matrix.scale_rule == ScaleRule::kGiven
                                     ? given_statistics(matrix, group)
                                     : slots[group].extent;
  return search_grid<kSweeps>(matrix, num_bits, extent,
                              [&](int i, const Sweep&) { return slots[group].sums[i]; });
}

/// True for a matrix whose rows share scales and which no tile covers.
__host__ __device__ bool is_empty(const FakeQuantizeTensor& matrix) {
  return rows_share_scales(matrix) && (matrix.rows == 0 || matrix.cols == 0);
}

// ----------------------------------------------------------------------------------------- kernels

/// Calls merge(slot, what was collected) for each group of several rows that a warp's threads have
/// a part of.
template <typename Collected, typename Merge>
__device__ void merge_into_slots(const FakeQuantizeTensor& matrix, const Tiling& tiling,
                                 const Place& place, GroupCollection* slots, Collected collected,
                                 const Merge& merge) {
  const bool lanes_differ =
      tiling.team == Team::kLane && matrix.granularity == Granularity::kPerRows;
  if (!lanes_differ) {
    collected = reduce_warp(collected);
  }
  if (place.active && (lanes_differ || threadIdx.x % kWarpSize == 0)) {
    merge(slots[place.row / rows_per_group(matrix)], collected);
  }
}

/// Extents of the groups of several rows.
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const __grid_constant__ Table table, const __grid_constant__ Step step) {
  if (step.skip != nullptr && *step.skip != 0.0F) {
    return;
  }
  for_each_tile(table, [&](int tensor, std::int64_t tile) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
    const Tiling tiling = tiling_of(matrix);
    if (matrix.scale_rule == ScaleRule::kGiven) {
      return;
    }
    const Place place = place_of(matrix, tiling, tile, static_cast<int>(threadIdx.x));
    merge_into_slots(matrix, tiling, place, slots_of(table, step, tensor),
                     place.active ? own_statistics(matrix, place) : GroupStatistics{},
                     [](GroupCollection& slot, const GroupStatistics& part) {
                       atomicMin(&slot.extent.lowest, part.lowest);
                       atomicMax(&slot.extent.highest, part.highest);
                     });
  });
}

/// What the sweeps of one stage sum up over the groups of several rows.
__global__ void __launch_bounds__(kThreads)
    sweep_kernel(const __grid_constant__ Table table, const __grid_constant__ Step step,
                 int stage) {
  if (step.skip != nullptr && *step.skip != 0.0F) {
    return;
  }
  for_each_tile(table, [&](int tensor, std::int64_t tile) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
    const Tiling tiling = tiling_of(matrix);
    const Place place = place_of(matrix, tiling, tile, static_cast<int>(threadIdx.x));
    const int num_bits = step.num_bits[table.number[tensor]];
    GroupCollection* slots = slots_of(table, step, tensor);
    const std::int64_t group = place.active ? place.row / rows_per_group(matrix) : 0;
    search_grid<true>(matrix, num_bits, slots[group].extent, [&](int i, const Sweep& sweep) {
      const int sweep_stage =
          stage_of_sweep({num_bits, matrix.mode, matrix.scale_rule, matrix.scale_dtype}, i);
      if (sweep_stage == stage) {
        merge_into_slots(matrix, tiling, place, slots,
                         place.active ? own_sums(matrix, place, sweep) : SweepSums{},
                         [&](GroupCollection& slot, const SweepSums& part) {
                           using Word = unsigned long long;
                           atomicAdd(reinterpret_cast<Word*>(&slot.sums[i].sum),
                                     static_cast<Word>(part.sum));
                           atomicAdd(reinterpret_cast<Word*>(&slot.sums[i].count),
                                     static_cast<Word>(part.count));
                         });
      }
      return sweep_stage < stage ? slots[group].sums[i] : SweepSums{};
    });
  });
}

/// Everything else. All threads of a block agree on the tensor, hence on every branch but `active`.
template <bool kSweeps>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_kernel(const __grid_constant__ Table table, const __grid_constant__ Step step) {
  if (step.skip != nullptr && *step.skip != 0.0F) {
    return;
  }
  const auto draw_step = static_cast<std::uint32_t>(step.step != nullptr ? *step.step : 0);
  for_each_tile(table, [&](int tensor, std::int64_t tile) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
    const Tiling tiling = tiling_of(matrix);
    const Place place = place_of(matrix, tiling, tile, static_cast<int>(threadIdx.x));
    const int num_bits = step.num_bits[table.number[tensor]];
    const float blend_ratio =
        step.blend_ratio != nullptr ? step.blend_ratio[table.number[tensor]] : 0.0F;
    GridParams grid{};
    if (num_bits != 0) {
      bool stores_grid = place.active && place.member == 0;
      std::int64_t group = place.row * tiling.runs_per_row + place.run;
      if (rows_share_scales(matrix)) {
        group = place.active ? place.row / rows_per_group(matrix) : 0;
        stores_grid = stores_grid && place.run == 0 && place.row % rows_per_group(matrix) == 0;
        grid = grid_of_slot<kSweeps>(matrix, slots_of(table, step, tensor), group, num_bits);
      } else {
        grid = grid_of_run<kSweeps>(matrix, tiling, place, num_bits);
      }
      if (stores_grid) {
        store_parameters(matrix, grid, group);
      }
    }
    if (place.active) {
      visit_float(matrix.input_dtype, [&]<typename Input>(Input) {
        visit_float(matrix.output_dtype, [&]<typename Output>(Output) {
          write_run<Input, Output>(matrix, place, num_bits, blend_ratio, step.seed, draw_step,
                                   grid);
        });
      });
    }
  });
}

/// Scales and zero points of groups of several rows without an element, which no tile reaches.
__global__ void empty_parameters_kernel(const __grid_constant__ Table table,
                                        const __grid_constant__ Step step) {
  if (step.skip != nullptr && *step.skip != 0.0F) {
    return;
  }
  for (int tensor = static_cast<int>(threadIdx.x); tensor < table.size; tensor += kThreads) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
    const int num_bits = step.num_bits[table.number[tensor]];
    if (!is_empty(matrix) || num_bits == 0) {
      continue;
    }
    for (std::int64_t group = 0; group < num_groups(matrix); ++group) {
      store_parameters(matrix,
                       grid_of_slot<true>(matrix, slots_of(table, step, tensor), group, num_bits),
                       group);
    }
  }
}

// ---------------------------------------------------------------------------------------- launcher

int multiprocessors() {
  int device = 0;
  int count = 0;
  MOQ_CUDA_CHECK(cudaGetDevice(&device));
  MOQ_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

bool sweeps(const FakeQuantizeTensor& matrix) {
  return may_sweep(matrix.mode, matrix.scale_rule);
}

/// Launches one stage of collect_groups for the matrices that are wanted.
template <typename Wanted>
void launch_stage(const FakeQuantizeArgs& args, const Step& step, int stage, int multiprocessors,
                  cudaStream_t stream, const Wanted& wanted) {
  if (stage == 0) {
    for_each_table(args.tensors, wanted, [&](const Table& table) {
      launch(statistics_kernel, table, step, multiprocessors, stream);
    });
  } else {
    for_each_table(
        args.tensors,
        [&](const FakeQuantizeTensor& matrix) { return wanted(matrix) && sweeps(matrix); },
        [&](const Table& table) {
          launch(sweep_kernel, table, step, multiprocessors, stream, stage - 1);
        });
  }
}

/// Fills every slot of the workspace from the groups of several rows.
void launch_collecting(const FakeQuantizeArgs& args, const Step& step, int multiprocessors,
                       cudaStream_t stream) {
  const std::size_t bytes = fake_quantize_workspace_size(args.tensors);
  if (bytes == 0) {
    return;
  }
  MOQ_CHECK(args.workspace != nullptr, "fake_quantize: scales that rows share need a workspace of ",
            bytes, " bytes, got null");
  MOQ_CUDA_CHECK(cudaMemsetAsync(args.workspace, 0, bytes, stream));
  for (int stage = 0; stage < kCollectStages; ++stage) {
    launch_stage(args, step, stage, multiprocessors, stream, is_collected_here);
  }
}

void check(const FakeQuantizeArgs& args) {
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    check_fake_quantize_tensor(args.tensors[i], i);
  }
}

}  // namespace

std::size_t fake_quantize_workspace_size(std::span<const FakeQuantizeTensor> tensors) {
  std::size_t slots = 0;
  for (const FakeQuantizeTensor& matrix : tensors) {
    slots += is_collected_here(matrix) ? static_cast<std::size_t>(num_groups(matrix)) : 0;
  }
  return slots * sizeof(GroupCollection);
}

void collect_groups(const FakeQuantizeArgs& args, int stage, CUstream_st* stream) {
  check(args);
  launch_stage(args, step_of(args), stage, multiprocessors(), stream,
               [](const FakeQuantizeTensor& matrix) { return matrix.collected != nullptr; });
}

void fake_quantize(const FakeQuantizeArgs& args, CUstream_st* stream) {
  check(args);
  if (args.tensors.empty()) {
    return;
  }
  const int sm_count = multiprocessors();
  const Step step = step_of(args);
  launch_collecting(args, step, sm_count, stream);
  fake_quantize_vectors(args, sm_count, stream);
  fake_quantize_groups(args, sm_count, stream);
  const auto others = [](const FakeQuantizeTensor& matrix) { return !takes_vectors(matrix); };
  for_each_table(args.tensors, others, [&](const Table& table) {
    const std::span tensors(table.tensors, static_cast<std::size_t>(table.size));
    if (std::ranges::any_of(tensors, sweeps)) {
      launch(fake_quantize_kernel<true>, table, step, sm_count, stream);
    } else {
      launch(fake_quantize_kernel<false>, table, step, sm_count, stream);
    }
    if (std::ranges::any_of(tensors, is_empty)) {
      launch_in_order(empty_parameters_kernel, 1, kThreads, stream, table, step);
    }
  });
}

}  // namespace moq::kernels::cuda
