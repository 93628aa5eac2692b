// Fake-quantize of the usual matrices: a thread requests many vectors at once, and keeps them in
// registers until the grid is known, or reads them again where they are too many. The bits are
// those of fake_quantize.cu, by instructions that suit numbers without NaN.
#include "kernels/cuda/fake_quantize_vectors.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "kernels/common/philox.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/fake_quantize_elements.h"
#include "kernels/cuda/fake_quantize_table.h"
#include "kernels/cuda/vectors.h"
#include "kernels/quant_grid.h"

namespace moq::kernels::cuda {
namespace {

/// The smallest and the largest number so far, 0 among them; a NaN if there is one.
struct Extent {
  float lowest = 0.0F;
  float highest = 0.0F;

  /// is_symmetric: only the largest magnitude counts.
  __device__ void include(float number, bool is_symmetric) {
    if (is_symmetric) {
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(highest) : "f"(fabsf(number)));
    } else {
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(highest) : "f"(number));
      asm("min.NaN.f32 %0, %0, %1;" : "+f"(lowest) : "f"(number));
    }
  }

  __device__ GroupStatistics statistics() const {
    return {ordered_bits(__float_as_int(lowest)), ordered_bits(__float_as_int(highest))};
  }
};

/// A grid as a row's numbers need it.
struct RowGrid {
  float inverse_scale;
  float scale;  ///< NaN: there is none, and NaN is all that comes of it
  float zero_point;

  __device__ bool exists() const { return scale == scale; }
};

__device__ RowGrid row_grid(const GridParams& grid) {
  return {grid.inverse_scale, grid.scale, static_cast<float>(grid.zero_point)};
}

/// What a call does to every number of a matrix.
template <bool kStochastic>
struct Simulation {
  float lowest_code;
  float highest_code;
  float blend_ratio;
  const PhiloxKeys& keys;  ///< in the launch's parameters: operands of instructions
  std::uint32_t step;
  std::uint32_t name_hash;

  __device__ Simulation(const FakeQuantizeTensor& matrix, int num_bits, float blend,
                        const PhiloxKeys& philox_keys, std::uint32_t draw_step)
      : blend_ratio(blend), keys(philox_keys), step(draw_step), name_hash(matrix.name_hash) {
    const GridRange range = grid_range(num_bits, matrix.mode);
    lowest_code = static_cast<float>(range.qmin);
    highest_code = static_cast<float>(range.qmax);
  }

  /// The random words of a quad, by its number in the parameter.
  __device__ PhiloxBlock words_of(std::int64_t quad) const {
    if constexpr (!kStochastic) {
      return {};
    }
    const auto number = static_cast<std::uint64_t>(quad);
    return philox4x32({{static_cast<std::uint32_t>(number),
                        static_cast<std::uint32_t>(number >> 32), step, name_hash}},
                      keys);
  }

  /// dequantize_one(quantize_one(number)). Codes are whole numbers that float32 holds exactly, and
  /// the numbers of a group that has a grid are finite.
  __device__ float simulated(float number, const RowGrid& grid, std::uint32_t word) const {
    const float position = number * grid.inverse_scale;
    float rounded;
    if constexpr (kStochastic) {
      rounded = floorf(position);
      // The uniform is word / 2^32 without the low eight bits; both sides times 2^24, exactly.
      const bool up = static_cast<float>(word >> 8) < (position - rounded) * 0x1p24F;
      rounded += up ? 1.0F : 0.0F;
    } else {
      constexpr float kRound = 0x1.8p23F;  // half to even; what is larger is clamped anyhow
      rounded = (position + kRound) - kRound;
    }
    rounded = fminf(fmaxf(rounded + grid.zero_point, lowest_code), highest_code);
    return (rounded - grid.zero_point) * grid.scale;
  }

  /// Whether simulated() is all there is to it.
  __device__ bool is_plain() const { return blend_ratio == 0.0F; }

  __device__ void blend(const Numbers<kQuad>& numbers, Numbers<kQuad>& results) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      results.unit[i] = blend_ratio * numbers.unit[i] + (1.0F - blend_ratio) * results.unit[i];
    }
  }
};

/// Numbers with canonical NaN among them, which the processor's conversions do not make.
template <typename Output>
__device__ Vector<Output, kQuad> rounded_with_nan(const Numbers<kQuad>& numbers) {
  Output elements[kQuad];
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    store_float(&elements[i], canonical(numbers.unit[i]));
  }
  Vector<Output, kQuad> vector;
  memcpy(&vector, elements, sizeof(vector));
  return vector;
}

/// Writes what is simulated of some numbers. is_usual: without blending, and every grid exists.
template <typename Output, bool kStochastic>
__device__ void write(const Simulation<kStochastic>& simulation, bool is_usual,
                      const Numbers<kQuad>& numbers, Numbers<kQuad> results, Output* output) {
  if (is_usual) {
    store_vector(output, rounded<Output>(results));
    return;
  }
  if (!simulation.is_plain()) {
    simulation.blend(numbers, results);
  }
  store_vector(output, rounded_with_nan<Output>(results));
}

/// A team's run along contiguous columns. Every thread of the block takes part.
template <typename Input, typename Output, bool kStochastic>
__device__ __forceinline__ void quantize_run(const FakeQuantizeTensor& matrix, const Tiling& tiling,
                                             const Place& place, int num_bits,
                                             const Simulation<kStochastic>& simulation) {
  const std::int64_t first_element = place.row * matrix.row_stride + place.begin;
  const Input* input = static_cast<const Input*>(matrix.input) + first_element;
  Output* output = static_cast<Output*>(matrix.output) + first_element;
  const int quads = place.active ? static_cast<int>((place.end - place.begin) / kQuad) : 0;
  const int chunk = kHeldQuads * place.members;
  Vector<Input, kQuad> held[kHeldQuads];
  const auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kHeldQuads; ++i) {
      const int quad = begin + place.member + i * place.members;
      if (quad < quads) {
        held[i] = load_vector<kQuad>(input + std::int64_t{kQuad} * quad);
      }
    }
  };

  Extent extent;
  const bool symmetric = is_symmetric(matrix.mode);
  for (int begin = 0; begin < quads; begin += chunk) {
    load(begin);
#pragma unroll
    for (int i = 0; i < kHeldQuads; ++i) {
      if (begin + place.member + i * place.members < quads) {
        const Numbers<kQuad> numbers = numbers_of(held[i]);
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
  const bool is_usual = exists(params) && simulation.is_plain();
  const std::int64_t pitch = matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols;
  const std::int64_t first_draw = (matrix.first_element + place.row * pitch + place.begin) / kQuad;
  // Backwards: what was read last is still held.
  const int last = quads > 0 ? (quads - 1) / chunk * chunk : 0;
  for (int begin = last; begin >= 0; begin -= chunk) {
    if (begin != last) {
      load(begin);
    }
#pragma unroll
    for (int i = 0; i < kHeldQuads; i += 2) {  // two at once, which wait for each other's latencies
      const int first = begin + place.member + i * place.members;
      if (first >= quads) {
        continue;
      }
      Numbers<kQuad> results[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const PhiloxBlock words = simulation.words_of(first_draw + first + u * place.members);
        const Numbers<kQuad> numbers = numbers_of(held[i + u]);
#pragma unroll
        for (int e = 0; e < kQuad; ++e) {
          results[u].unit[e] = simulation.simulated(numbers.unit[e], grid, words.word[e]);
        }
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int quad = first + u * place.members;
        if (quad < quads) {
          write(simulation, is_usual, numbers_of(held[i + u]), results[u],
                output + std::int64_t{kQuad} * quad);
        }
      }
    }
  }
}

/// 32 rows that are contiguous where columns are not. A thread takes four rows of four columns at
/// once: eight lanes make up the rows, 32 such parties of the block take quads of columns in turn.
template <typename Input, typename Output, bool kStochastic>
__device__ __forceinline__ void quantize_rows(const FakeQuantizeTensor& matrix, std::int64_t tile,
                                              int num_bits,
                                              const Simulation<kStochastic>& simulation) {
  constexpr int kLanes = kWarpSize / kQuad;  // of a party
  constexpr int kParties = kThreads / kLanes;
  constexpr int kHeldUnits = kStochastic ? 2 : 4;  // quads of columns; registers decide
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
  const int units = active ? static_cast<int>(matrix.cols / kQuad) : 0;
  constexpr int kChunk = kHeldUnits * kParties;
  Vector<Input, kQuad> held[kHeldUnits][kQuad];  // [quad of columns, column], of rows
  const auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < kHeldUnits; ++i) {
      const int unit = begin + party + i * kParties;
      if (unit < units) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          held[i][j] =
              load_vector<kQuad>(input + (std::int64_t{kQuad} * unit + j) * matrix.col_stride);
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
        for (int j = 0; j < kQuad; ++j) {
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
  const bool is_usual = simulation.is_plain() && own_grids[0].exists() && own_grids[1].exists() &&
                        own_grids[2].exists() && own_grids[3].exists();
  const std::int64_t pitch =
      (matrix.unsharded_cols != 0 ? matrix.unsharded_cols : matrix.cols) / kQuad;
  const std::int64_t first_draw = matrix.first_element / kQuad + (first_row + own_row) * pitch;
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
      Numbers<kQuad> results[kQuad];  // [column], of rows
#pragma unroll
      for (int row = 0; row < kQuad; ++row) {
        const RowGrid grid = own_grids[row];
        const PhiloxBlock words = simulation.words_of(first_draw + row * pitch + unit);
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          results[j].unit[row] =
              simulation.simulated(numbers_of(held[i][j]).unit[row], grid, words.word[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        write(simulation, is_usual, numbers_of(held[i][j]), results[j],
              output + (std::int64_t{kQuad} * unit + j) * matrix.col_stride);
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
  for_each_tile(table, [&](int tensor, const Tiling& tiling, std::int64_t tile) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
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
    const Simulation<kStochastic> simulation(matrix, num_bits, blend_ratio, keys, draw_step);
    if constexpr (kByRows) {
      quantize_rows<Input, Output>(matrix, tile, num_bits, simulation);
    } else {
      quantize_run<Input, Output>(matrix, tiling, place, num_bits, simulation);
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
  const Step step{.num_bits = args.num_bits,
                  .blend_ratio = args.blend_ratio,
                  .step = args.step,
                  .skip = args.skip,
                  .slots = nullptr,
                  .seed = args.seed};
  std::vector<Kind> kinds;
  for (const FakeQuantizeTensor& matrix : args.tensors) {
    if (takes_vectors(matrix) && std::ranges::find(kinds, kind_of(matrix)) == kinds.end()) {
      kinds.push_back(kind_of(matrix));
    }
  }
  for (const Kind& kind : kinds) {
    const auto wanted = [&](const FakeQuantizeTensor& matrix) {
      return takes_vectors(matrix) && kind_of(matrix) == kind;
    };
    for_each_table(args.tensors, wanted, [&](const Table& table) {
      visit_kernel(kind, [&](auto kernel) {
        launch(kernel, table, step, multiprocessors, stream, philox_keys(args.seed));
      });
    });
  }
}

}  // namespace moq::kernels::cuda
