// Fake-quantize of the usual matrices: a thread requests many vectors at once, and keeps them in
// registers until the grid is known, or reads them again where they are too many. The bits are
// those of fake_quantize.cu, by instructions that suit numbers without NaN.
#include "kernels/cuda/fake_quantize_vectors.h"

#include <cuda_runtime.h>

#include <cstring>

#include "kernels/common/visit.h"
#include "kernels/cuda/fake_quantize_elements.h"
#include "kernels/cuda/fake_quantize_groups.h"
#include "kernels/cuda/fake_quantize_table.h"
#include "kernels/cuda/fake_quantize_vector_math.h"
#include "kernels/cuda/vectors.h"
#include "kernels/quant_grid.h"

namespace moq::kernels::cuda {
namespace {

/// A team's run along contiguous columns, by vectors of 16 bytes of input. Every thread of the
/// block takes part.
template <typename Input, typename Output, bool kStochastic>
__device__ __forceinline__ void quantize_run(const FakeQuantizeTensor& matrix, const Tiling& tiling,
                                             const Place& place, int num_bits, float blend_ratio,
                                             const Draws<kStochastic>& draws) {
  constexpr int kWidth = kLoadBytes / static_cast<int>(sizeof(Input));
  constexpr int kHeld = kHeldBytes / kLoadBytes;
  constexpr int kShare = kPhiloxHalves / kWidth;  // vectors whose draws are one block
  const std::int64_t first_element = place.row * matrix.row_stride + place.begin;
  const Input* input = static_cast<const Input*>(matrix.input) + first_element;
  Output* output = static_cast<Output*>(matrix.output) + first_element;
  const int vectors = place.active ? static_cast<int>((place.end - place.begin) / kWidth) : 0;
  const int chunk = kHeld * place.members;
  Vector<Input, kWidth> held[kHeld];
  const auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = begin + place.member + i * place.members;
      if (vector < vectors) {
        held[i] = load_vector<kWidth>(input + vector * kWidth);
      }
    }
  };

  Extent extent;
  const bool symmetric = is_symmetric(matrix.mode);
  for (int begin = 0; begin < vectors; begin += chunk) {
    load(begin);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (begin + place.member + i * place.members < vectors) {
        const Numbers<kWidth> numbers = numbers_of(held[i]);
#pragma unroll
        for (const float number : numbers.unit) {
          extent.include(number, symmetric);
        }
      }
    }
  }
  const GroupStatistics statistics = reduce_team(tiling, extent.statistics());
  const GridParams params = make_grid(statistics, num_bits, matrix.mode, matrix.scale_dtype);
  if (place.active && place.member == 0) {
    store_parameters(matrix, params, place.row * tiling.runs_per_row + place.run);
  }
  const RowGrid grid = row_grid(params);
  const bool is_usual = exists(params) && blend_ratio == 0.0F;
  const std::int64_t pitch = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
  const auto first_block = static_cast<std::uint32_t>(
      (matrix.first_element + place.row * pitch + place.begin) / kPhiloxHalves);
  // Backwards: what was read last is still held.
  const int last = vectors > 0 ? (vectors - 1) / chunk * chunk : 0;
  for (int begin = last; begin >= 0; begin -= chunk) {
    if (begin != last) {
      load(begin);
    }
#pragma unroll
    for (int i = 0; i < kHeld; i += kShare) {
      const int first = begin + place.member + i * place.members;
      if (first - first % kWarpSize >= vectors) {  // for the whole warp: it exchanges draws
        continue;
      }
      std::uint32_t words[kShare][kWidth / 2];
      if constexpr (kStochastic && kShare == 1) {
        const PhiloxBlock block = draws.block(first_block + static_cast<std::uint32_t>(first));
        memcpy(words[0], block.word, sizeof(words[0]));
      } else if constexpr (kStochastic) {
        draw_pairs(draws, first_block, first, first + place.members, words);
      }
#pragma unroll
      for (int u = 0; u < kShare; ++u) {
        const Numbers<kWidth> numbers = numbers_of(held[i + u]);
        Numbers<kWidth> results;
#pragma unroll
        for (int e = 0; e < kWidth; e += 2) {
          results.unit[e] = simulated<kStochastic, 0>(numbers.unit[e], grid, words[u][e / 2]);
          results.unit[e + 1] =
              simulated<kStochastic, 1>(numbers.unit[e + 1], grid, words[u][e / 2]);
        }
        const int vector = first + u * place.members;
        if (vector < vectors) {
          write(blend_ratio, is_usual, numbers, results, output + vector * kWidth);
        }
      }
    }
  }
}

/// 32 rows that are contiguous where columns are not. A thread takes four rows of eight columns at
/// once: eight lanes make up the rows, 32 such parties of the block take eights of columns in turn.
template <typename Input, typename Output, bool kStochastic>
__device__ __forceinline__ void quantize_rows(const FakeQuantizeTensor& matrix, std::int64_t tile,
                                              int num_bits, float blend_ratio,
                                              const Draws<kStochastic>& draws) {
  constexpr int kLanes = kWarpSize / kQuad;  // of a party
  constexpr int kParties = kThreads / kLanes;
  constexpr int kColumns = kPhiloxHalves;
  constexpr int kHeldUnits = kStochastic ? 1 : 2;  // eights of columns; registers decide
  __shared__ GroupStatistics collected[kWarps][kWarpSize];
  __shared__ RowGrid grids[kWarpSize];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int party = thread / kLanes;
  const std::int64_t first_row = tile * kWarpSize;
  const int own_row = lane % kLanes * kQuad;  // the first of four
  const bool active = first_row + own_row < matrix.rows;
  const Input* input = static_cast<const Input*>(matrix.input) + first_row + own_row;
  Output* output = static_cast<Output*>(matrix.output) + first_row + own_row;
  const int units = active ? static_cast<int>(matrix.cols / kColumns) : 0;
  constexpr int kChunk = kHeldUnits * kParties;
  Vector<Input, kQuad> held[kHeldUnits][kColumns];  // [eight of columns, column], of rows
  const auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kHeldUnits; ++i) {
      const int unit = begin + party + i * kParties;
      if (unit < units) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          held[i][j] =
              load_vector<kQuad>(input + (std::int64_t{kColumns} * unit + j) * matrix.col_stride);
        }
      }
    }
  };

  Extent extents[kQuad];
  const bool symmetric = is_symmetric(matrix.mode);
  for (int begin = 0; begin < units; begin += kChunk) {
    load(begin);
#pragma unroll
    for (int i = 0; i < kHeldUnits; ++i) {
      if (begin + party + i * kParties < units) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const Numbers<kQuad> numbers = numbers_of(held[i][j]);
#pragma unroll
          for (int row = 0; row < kQuad; ++row) {
            extents[row].include(numbers.unit[row], symmetric);
          }
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kQuad; ++row) {
    GroupStatistics statistics = extents[row].statistics();
#pragma unroll
    for (int distance = kLanes; distance < kWarpSize; distance *= 2) {
      statistics = merge(statistics, {__shfl_xor_sync(0xffffffffU, statistics.lowest, distance),
                                      __shfl_xor_sync(0xffffffffU, statistics.highest, distance)});
    }
    if (lane < kLanes) {
      collected[warp][own_row + row] = statistics;
    }
  }
  __syncthreads();
  if (thread < kWarpSize) {
    GroupStatistics statistics = collected[0][thread];
    for (int other = 1; other < kWarps; ++other) {
      statistics = merge(statistics, collected[other][thread]);
    }
    const GridParams params = make_grid(statistics, num_bits, matrix.mode, matrix.scale_dtype);
    grids[thread] = row_grid(params);
    if (first_row + thread < matrix.rows) {
      store_parameters(matrix, params, first_row + thread);
    }
  }
  __syncthreads();

  const RowGrid* const own_grids = grids + own_row;
  const bool is_usual = blend_ratio == 0.0F && own_grids[0].exists() && own_grids[1].exists() &&
                        own_grids[2].exists() && own_grids[3].exists();
  const std::int64_t pitch =
      (matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols) / kPhiloxHalves;
  const std::int64_t first_block =
      matrix.first_element / kPhiloxHalves + (first_row + own_row) * pitch;
  const int last = units > 0 ? (units - 1) / kChunk * kChunk : 0;
  for (int begin = last; begin >= 0; begin -= kChunk) {
    if (begin != last) {
      load(begin);
    }
#pragma unroll
    for (int i = 0; i < kHeldUnits; ++i) {
      const int unit = begin + party + i * kParties;
      if (unit >= units) {
        continue;
      }
      PhiloxBlock blocks[kQuad];
#pragma unroll
      for (int row = 0; row < kQuad; ++row) {
        blocks[row] = draws.block(static_cast<std::uint32_t>(first_block + row * pitch + unit));
      }
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        const Numbers<kQuad> numbers[2] = {numbers_of(held[i][j]), numbers_of(held[i][j + 1])};
        Numbers<kQuad> results[2];
#pragma unroll
        for (int row = 0; row < kQuad; ++row) {
          const RowGrid grid = own_grids[row];
          const std::uint32_t word = blocks[row].word[j / 2];
          results[0].unit[row] = simulated<kStochastic, 0>(numbers[0].unit[row], grid, word);
          results[1].unit[row] = simulated<kStochastic, 1>(numbers[1].unit[row], grid, word);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          write(blend_ratio, is_usual, numbers[h], results[h],
                output + (std::int64_t{kColumns} * unit + j + h) * matrix.col_stride);
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------ kernel

/// Matrices of one kind. kByRows: rows are contiguous, not columns.
template <typename Input, typename Output, bool kStochastic, bool kByRows>
__global__ void __launch_bounds__(kThreads, kByRows ? 2 : 3)
    vectors_kernel(const __grid_constant__ Table table, const __grid_constant__ Step step,
                   const __grid_constant__ PhiloxKeys keys) {
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
    if (!has_grid(matrix, num_bits)) {  // copies, or NaN
      if (place.active) {
        if (num_bits != 0 && place.member == 0) {
          store_parameters(matrix, no_grid(), place.row * tiling.runs_per_row + place.run);
        }
        write_run<Input, Output>(matrix, place, num_bits, blend_ratio, step.seed, draw_step,
                                 no_grid());
      }
      return;
    }
    const Draws<kStochastic> draws(matrix, keys, draw_step);
    if constexpr (kByRows) {
      quantize_rows<Input, Output>(matrix, tile, num_bits, blend_ratio, draws);
    } else {
      quantize_run<Input, Output>(matrix, tiling, place, num_bits, blend_ratio, draws);
    }
  });
}

/// What a matrix needs a kernel of its own for.
struct Kind {
  DType input;
  DType output;
  Rounding rounding;
  Team team;

  bool operator==(const Kind&) const = default;
};

/// Whether a matrix is left to the kernels here.
bool takes_runs(const FakeQuantizeTensor& matrix) {
  return takes_vectors(matrix) && !takes_groups(matrix);
}

Kind kind_of(const FakeQuantizeTensor& matrix) {
  return {matrix.input_dtype, matrix.output_dtype, matrix.rounding, tiling_of(matrix).team};
}

/// Calls visitor(kernel) for the kernel of a kind.
template <typename Visitor>
void visit_kernel(const Kind& kind, const Visitor& visitor) {
  visit_float(kind.input, [&]<typename Input>(Input) {
    visit_float(kind.output, [&]<typename Output>(Output) {
      const bool by_rows = kind.team == Team::kLane;
      if (kind.rounding == Rounding::kStochastic) {
        by_rows ? visitor(vectors_kernel<Input, Output, true, true>)
                : visitor(vectors_kernel<Input, Output, true, false>);
      } else {
        by_rows ? visitor(vectors_kernel<Input, Output, false, true>)
                : visitor(vectors_kernel<Input, Output, false, false>);
      }
    });
  });
}

}  // namespace

void fake_quantize_vectors(const FakeQuantizeArgs& args, int multiprocessors, CUstream_st* stream) {
  const Step step = step_of(args);
  for_each_kind(args.tensors, takes_runs, kind_of, [&](const Kind& kind, const Table& table) {
    visit_kernel(kind, [&](auto kernel) {
      launch(kernel, table, step, multiprocessors, stream, philox_keys(args.seed));
    });
  });
}

}  // namespace moq::kernels::cuda
