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
#include "kernels/common/philox.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/fake_quantize_tiles.h"
#include "kernels/fake_quantize.h"
#include "kernels/quant_grid.h"

namespace moq::kernels::cuda {
namespace {

// ------------------------------------------------------------------------------ launch parameters

constexpr int kTableSize = 256;

/// The matrices of one launch. It travels by value: a launch may carry 32,764 bytes of parameters,
/// and a captured graph keeps them with its node.
struct Table {
  FakeQuantizeTensor tensors[kTableSize];
  std::int64_t first_tile[kTableSize + 1];  // of each tensor; then the number of all
  std::int32_t slot[kTableSize];            // of the matrices with one scale, in statistics
  std::int32_t size;
};

/// What a call has besides the matrices. All pointers are device memory.
struct Step {
  const std::int32_t* num_bits;  // [Table::size]
  const float* blend_ratio;      // [Table::size] or null
  const std::int64_t* step;      // [1] or null
  const float* skip;             // [1] or null
  GroupStatistics* statistics;   // by slot
  std::uint64_t seed;
};

static_assert(sizeof(Table) + sizeof(Step) <= 32764);

// ------------------------------------------------------------------------------- device functions

/// Four neighbouring elements of one row, or fewer at a row's end.
struct Quad {
  float value[kQuad];
};

/// The machine word that holds a quad of contiguous elements.
template <typename Element>
struct alignas(kQuad * sizeof(Element)) Packed {
  Element element[kQuad];
};

template <typename Element>
__device__ bool loads_packed(const Element* address, std::int64_t stride, int count) {
  return stride == 1 && count == kQuad &&
         reinterpret_cast<std::uintptr_t>(address) % sizeof(Packed<Element>) == 0;
}

/// Elements past `count` are 0, which changes no statistics.
template <typename Element>
__device__ Quad load_quad(const Element* address, std::int64_t stride, int count) {
  Quad quad{};
  if (loads_packed(address, stride, count)) {
    const auto packed = *reinterpret_cast<const Packed<Element>*>(address);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      quad.value[i] = to_float(packed.element[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i < count) {
        quad.value[i] = to_float(address[i * stride]);
      }
    }
  }
  return quad;
}

template <typename Element>
__device__ void store_quad(Element* address, std::int64_t stride, int count, const Quad& quad) {
  if (loads_packed(address, stride, count)) {
    Packed<Element> packed;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      store_float(&packed.element[i], quad.value[i]);
    }
    *reinterpret_cast<Packed<Element>*>(address) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i < count) {
        store_float(address + i * stride, quad.value[i]);
      }
    }
  }
}

/// Calls body(first column, number of columns) for the quads of a run that are this thread's.
template <typename Body>
__device__ void for_each_quad(const Place& place, const Body& body) {
  for (std::int64_t col = place.begin + std::int64_t{kQuad} * place.member; col < place.end;
       col += std::int64_t{kQuad} * place.members) {
    const std::int64_t left = place.end - col;
    body(col, left < kQuad ? static_cast<int>(left) : kQuad);
  }
}

__device__ void include(GroupStatistics& statistics, float value, QuantMode mode) {
  const auto bits = std::bit_cast<std::int32_t>(value);
  if (mode == QuantMode::kSymmetric) {
    statistics.highest = max(statistics.highest, bits & kMagnitudeMask);
  } else {
    statistics.lowest = min(statistics.lowest, ordered_bits(bits));
    statistics.highest = max(statistics.highest, ordered_bits(bits));
  }
}

/// Statistics of this thread's part of a run.
__device__ GroupStatistics own_statistics(const FakeQuantizeTensor& matrix, const Place& place) {
  GroupStatistics statistics;
  visit_float(matrix.input_dtype, [&]<typename Input>(Input) {
    const Input* row = static_cast<const Input*>(matrix.input) + place.row * matrix.row_stride;
    for_each_quad(place, [&](std::int64_t col, int count) {
      const Quad quad = load_quad(row + col * matrix.col_stride, matrix.col_stride, count);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        include(statistics, quad.value[i], matrix.mode);
      }
    });
  });
  return statistics;
}

__device__ GroupStatistics reduce_warp(GroupStatistics statistics) {
  constexpr unsigned kAllLanes = 0xffffffffU;
  return {__reduce_min_sync(kAllLanes, statistics.lowest),
          __reduce_max_sync(kAllLanes, statistics.highest)};
}

__device__ GroupStatistics merge(const GroupStatistics& a, const GroupStatistics& b) {
  return {min(a.lowest, b.lowest), max(a.highest, b.highest)};
}

/// Statistics of the whole team. Every thread of the block takes part, active or not.
__device__ GroupStatistics reduce_team(Team team, GroupStatistics statistics) {
  __shared__ GroupStatistics shared[kWarps][kWarpSize];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  if (team != Team::kLane) {
    statistics = reduce_warp(statistics);
    if (team == Team::kWarp) {
      return statistics;
    }
  }
  shared[warp][lane] = statistics;
  __syncthreads();
  for (int other = 0; other < kWarps; ++other) {
    statistics = merge(statistics, shared[other][lane]);
  }
  __syncthreads();  // the next tile writes `shared` again
  return statistics;
}

/// Uniforms of the quad whose first element has number `element` in the parameter.
__device__ Quad draw_quad(std::uint64_t element, std::uint32_t step, std::uint32_t name_hash,
                          std::uint64_t seed) {
  const auto block_of = [&](std::uint64_t block) {
    return philox4x32({{static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                        step, name_hash}},
                      seed);
  };
  const auto shift = static_cast<int>(element % 4);
  const PhiloxBlock first = block_of(element / 4);
  const PhiloxBlock second = shift == 0 ? first : block_of(element / 4 + 1);
  Quad quad;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    std::uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 2 * kQuad - 1; ++j) {  // word = (first, second)[i + shift], in registers
      if (j == i + shift) {
        word = j < kQuad ? first.word[j] : second.word[j - kQuad];
      }
    }
    quad.value[i] = uniform_from_word(word);
  }
  return quad;
}

__device__ bool has_grid(const FakeQuantizeTensor& matrix, int num_bits) {
  const int most = matrix.codes != nullptr && matrix.codes_dtype == DType::kInt8 ? 8 : kMaxBits;
  return num_bits >= kMinBits && num_bits <= most;
}

__device__ GridParams grid_of(const FakeQuantizeTensor& matrix, int num_bits,
                              const GroupStatistics& statistics) {
  if (!has_grid(matrix, num_bits)) {
    const float nan = std::bit_cast<float>(kQuietNaNBits);
    return {nan, nan, 0, {0, 0}};
  }
  return make_grid(statistics, num_bits, matrix.mode, matrix.scale_dtype);
}

__device__ void store_parameters(const FakeQuantizeTensor& matrix, const GridParams& grid,
                                 std::int64_t group) {
  if (matrix.scales != nullptr) {
    visit_float(matrix.scale_dtype, [&]<typename Scale>(Scale) {
      store_float(static_cast<Scale*>(matrix.scales) + group, grid.scale);
    });
  }
  if (matrix.zero_points != nullptr) {
    matrix.zero_points[group] = grid.zero_point;
  }
}

__device__ void store_code(const FakeQuantizeTensor& matrix, std::int64_t place,
                           std::int32_t code) {
  if (matrix.codes_dtype == DType::kInt8) {
    static_cast<std::int8_t*>(matrix.codes)[place] = static_cast<std::int8_t>(code);
  } else {
    static_cast<std::int16_t*>(matrix.codes)[place] = static_cast<std::int16_t>(code);
  }
}

/// Quantizes this thread's part of a run, or copies it when num_bits is 0.
template <typename Input, typename Output>
__device__ void write_run(const FakeQuantizeTensor& matrix, const Place& place, int num_bits,
                          float blend_ratio, std::uint64_t seed, std::uint32_t step,
                          const GridParams& grid) {
  const std::int64_t first = place.row * matrix.row_stride;
  const Input* input = static_cast<const Input*>(matrix.input) + first;
  Output* output = matrix.output == nullptr ? nullptr : static_cast<Output*>(matrix.output) + first;
  const std::int64_t pitch = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
  const float nan = std::bit_cast<float>(kQuietNaNBits);
  for_each_quad(place, [&](std::int64_t col, int count) {
    Quad quad = load_quad(input + col * matrix.col_stride, matrix.col_stride, count);
    if (num_bits != 0) {
      Quad uniform{};
      if (matrix.rounding == Rounding::kStochastic) {
        const std::int64_t element = matrix.first_element + place.row * pitch + col;
        uniform = draw_quad(static_cast<std::uint64_t>(element), step, matrix.name_hash, seed);
      }
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const bool exists = grid.scale == grid.scale;
        const std::int32_t code =
            exists ? quantize_one(quad.value[i], grid, matrix.rounding, uniform.value[i]) : 0;
        if (matrix.codes != nullptr && i < count) {
          store_code(matrix, place.row * matrix.cols + col + i, code);
        }
        float result = dequantize_one(code, grid);
        if (blend_ratio != 0.0F) {
          result = blend_ratio * quad.value[i] + (1.0F - blend_ratio) * result;
        }
        quad.value[i] = exists ? result : nan;
      }
    }
    if (output != nullptr) {
      store_quad(output + col * matrix.col_stride, matrix.col_stride, count, quad);
    }
  });
}

/// Calls body(tensor's index in the table, its tiling, tile) for the tiles that are this block's.
template <typename Body>
__device__ void for_each_tile(const Table& table, const Body& body) {
  int tensor = 0;
  const std::int64_t tiles = table.first_tile[table.size];
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    while (tile >= table.first_tile[tensor + 1]) {
      ++tensor;
    }
    body(tensor, tiling_of(table.tensors[tensor]), tile - table.first_tile[tensor]);
  }
}

// ----------------------------------------------------------------------------------------- kernels

/// Statistics of matrices that have one scale, merged into their slots.
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const __grid_constant__ Table table, const __grid_constant__ Step step) {
  if (step.skip != nullptr && *step.skip != 0.0F) {
    return;
  }
  for_each_tile(table, [&](int tensor, const Tiling& tiling, std::int64_t tile) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
    const Place place = place_of(matrix, tiling, tile, static_cast<int>(threadIdx.x));
    const GroupStatistics statistics =
        reduce_warp(place.active ? own_statistics(matrix, place) : GroupStatistics{});
    if (threadIdx.x % kWarpSize == 0) {
      GroupStatistics& all = step.statistics[table.slot[tensor]];
      atomicMin(&all.lowest, statistics.lowest);
      atomicMax(&all.highest, statistics.highest);
    }
  });
}

/// Everything else. All threads of a block agree on the tensor, hence on every branch but `active`.
__global__ void __launch_bounds__(kThreads)
    fake_quantize_kernel(const __grid_constant__ Table table, const __grid_constant__ Step step) {
  if (step.skip != nullptr && *step.skip != 0.0F) {
    return;
  }
  const auto draw_step = static_cast<std::uint32_t>(step.step != nullptr ? *step.step : 0);
  for_each_tile(table, [&](int tensor, const Tiling& tiling, std::int64_t tile) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
    const Place place = place_of(matrix, tiling, tile, static_cast<int>(threadIdx.x));
    const int num_bits = step.num_bits[tensor];
    const float blend_ratio = step.blend_ratio != nullptr ? step.blend_ratio[tensor] : 0.0F;
    const bool one_scale = matrix.granularity == Granularity::kPerTensor;
    GridParams grid{};
    if (num_bits != 0) {
      const GroupStatistics statistics =
          one_scale ? step.statistics[table.slot[tensor]]
                    : reduce_team(tiling.team,
                                  place.active ? own_statistics(matrix, place) : GroupStatistics{});
      grid = grid_of(matrix, num_bits, statistics);
      const bool first_run = place.row == 0 && place.run == 0;
      if (place.active && place.member == 0 && (!one_scale || first_run)) {
        store_parameters(matrix, grid, one_scale ? 0 : place.row * tiling.runs_per_row + place.run);
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

/// Scale and zero point of matrices that have one scale and no element, which no tile reaches.
__global__ void empty_parameters_kernel(const __grid_constant__ Table table,
                                        const __grid_constant__ Step step) {
  if (step.skip != nullptr && *step.skip != 0.0F) {
    return;
  }
  for (int tensor = static_cast<int>(threadIdx.x); tensor < table.size; tensor += kThreads) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
    const bool empty = matrix.rows == 0 || matrix.cols == 0;
    if (matrix.granularity == Granularity::kPerTensor && empty && step.num_bits[tensor] != 0) {
      store_parameters(matrix, grid_of(matrix, step.num_bits[tensor], GroupStatistics{}), 0);
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

bool has_one_scale(const FakeQuantizeTensor& matrix) {
  return matrix.granularity == Granularity::kPerTensor;
}

void append(Table& table, const FakeQuantizeTensor& matrix, std::int32_t slot) {
  table.tensors[table.size] = matrix;
  table.slot[table.size] = slot;
  table.first_tile[table.size + 1] = table.first_tile[table.size] + tiling_of(matrix).tiles;
  ++table.size;
}

template <typename Kernel>
void launch(Kernel kernel, const Table& table, const Step& step, int multiprocessors,
            cudaStream_t stream) {
  const std::int64_t tiles = table.first_tile[table.size];
  if (tiles == 0) {
    return;
  }
  const LaunchConfig config = fake_quantize_launch(tiles, multiprocessors);
  kernel<<<config.blocks, config.threads, 0, stream>>>(table, step);
  MOQ_CUDA_CHECK(cudaGetLastError());
}

/// Fills every slot of the workspace from the matrices that have one scale.
void launch_statistics(const FakeQuantizeArgs& args, const Step& step, int multiprocessors,
                       cudaStream_t stream) {
  const std::size_t bytes = fake_quantize_workspace_size(args.tensors);
  if (bytes == 0) {
    return;
  }
  MOQ_CHECK(args.workspace != nullptr, "fake_quantize: per-tensor scales need a workspace of ",
            bytes, " bytes, got null");
  MOQ_CUDA_CHECK(cudaMemsetAsync(args.workspace, 0, bytes, stream));
  Table table{};
  std::int32_t slot = 0;
  for (const FakeQuantizeTensor& matrix : args.tensors) {
    if (!has_one_scale(matrix)) {
      continue;
    }
    append(table, matrix, slot++);
    if (table.size == kTableSize) {
      launch(statistics_kernel, table, step, multiprocessors, stream);
      table = {};
    }
  }
  launch(statistics_kernel, table, step, multiprocessors, stream);
}

}  // namespace

std::size_t fake_quantize_workspace_size(std::span<const FakeQuantizeTensor> tensors) {
  return static_cast<std::size_t>(std::count_if(tensors.begin(), tensors.end(), has_one_scale)) *
         sizeof(GroupStatistics);
}

void fake_quantize(const FakeQuantizeArgs& args, CUstream_st* stream) {
  for (std::size_t i = 0; i < args.tensors.size(); ++i) {
    check_fake_quantize_tensor(args.tensors[i], i);
  }
  if (args.tensors.empty()) {
    return;
  }
  const int sm_count = multiprocessors();
  Step step{.num_bits = args.num_bits,
            .blend_ratio = args.blend_ratio,
            .step = args.step,
            .skip = args.skip,
            .statistics = static_cast<GroupStatistics*>(args.workspace),
            .seed = args.seed};
  launch_statistics(args, step, sm_count, stream);
  std::int32_t slot = 0;
  for (std::size_t first = 0; first < args.tensors.size(); first += kTableSize) {
    const std::size_t count = std::min<std::size_t>(kTableSize, args.tensors.size() - first);
    Table table{};
    bool empty_tensor = false;
    for (const FakeQuantizeTensor& matrix : args.tensors.subspan(first, count)) {
      empty_tensor |= has_one_scale(matrix) && (matrix.rows == 0 || matrix.cols == 0);
      append(table, matrix, has_one_scale(matrix) ? slot++ : 0);
    }
    step.num_bits = args.num_bits + first;
    step.blend_ratio = args.blend_ratio != nullptr ? args.blend_ratio + first : nullptr;
    launch(fake_quantize_kernel, table, step, sm_count, stream);
    if (empty_tensor) {
      empty_parameters_kernel<<<1, kThreads, 0, stream>>>(table, step);
      MOQ_CUDA_CHECK(cudaGetLastError());
    }
  }
}

}  // namespace moq::kernels::cuda
