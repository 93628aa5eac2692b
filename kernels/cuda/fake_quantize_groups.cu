// Fake-quantize in small groups: a group is a few neighbouring lanes' vectors, so that its extent
// is found by shuffles and nothing is read twice.
#include "kernels/cuda/fake_quantize_groups.h"

#include <cuda_runtime.h>

#include <cstring>

#include "kernels/common/integer_math.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/fake_quantize_elements.h"
#include "kernels/cuda/fake_quantize_table.h"
#include "kernels/cuda/fake_quantize_vector_math.h"
#include "kernels/cuda/vectors.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kHeldVectors = 4;  // of a thread
constexpr int kTileVectors = kHeldVectors * kThreads;

std::int64_t tiles_of(const FakeQuantizeTensor& matrix) {
  const auto bytes =
      matrix.rows * matrix.cols * static_cast<std::int64_t>(size_of(matrix.input_dtype));
  return divide_up(bytes / kLoadBytes, std::int64_t{kTileVectors});
}

/// Grid of the group that `lanes` neighbouring lanes hold. Whole warps take part.
__device__ GridParams grid_of_lanes(const FakeQuantizeTensor& matrix, GroupStatistics statistics,
                                    int lanes, int num_bits) {
  const bool symmetric = is_symmetric(matrix.mode);
  for (int distance = 1; distance < lanes; distance *= 2) {
    statistics.highest =
        max(statistics.highest, __shfl_xor_sync(0xffffffffU, statistics.highest, distance));
    if (!symmetric) {
      statistics.lowest =
          min(statistics.lowest, __shfl_xor_sync(0xffffffffU, statistics.lowest, distance));
    }
  }
  return make_grid(statistics, num_bits, matrix.mode, matrix.scale_dtype);
}

/// A tile of neighbouring vectors. Every thread of the block takes part.
template <typename Input, typename Output, bool kStochastic>
__device__ __forceinline__ void quantize_tile(const FakeQuantizeTensor& matrix, std::int64_t tile,
                                              int num_bits, float blend_ratio,
                                              const Draws<kStochastic>& draws) {
  constexpr int kWidth = kLoadBytes / static_cast<int>(sizeof(Input));
  constexpr int kShare = kPhiloxHalves / kWidth;  // vectors whose draws are one block
  const Input* const input = static_cast<const Input*>(matrix.input);
  Output* const output = static_cast<Output*>(matrix.output);
  const std::int64_t vectors = matrix.rows * matrix.cols / kWidth;
  const std::int64_t first = tile * kTileVectors + static_cast<int>(threadIdx.x);
  const int lanes = static_cast<int>(columns_per_group(matrix) / kWidth);
  const int shift = __ffs(lanes) - 1;
  const bool symmetric = is_symmetric(matrix.mode);
  const auto first_block = static_cast<std::uint32_t>(matrix.first_element / kPhiloxHalves);

  Vector<Input, kWidth> held[kHeldVectors] = {};
#pragma unroll
  for (int i = 0; i < kHeldVectors; ++i) {
    const std::int64_t vector = first + i * kThreads;
    if (vector < vectors) {
      held[i] = load_vector<kWidth>(input + vector * kWidth);
    }
  }
#pragma unroll
  for (int i = 0; i < kHeldVectors; i += kShare) {
    std::uint32_t words[kShare][kWidth / 2];
    const std::int64_t own = first + i * kThreads;
    if constexpr (kStochastic && kShare == 1) {
      const PhiloxBlock block = draws.block(first_block + static_cast<std::uint32_t>(own));
      memcpy(words[0], block.word, sizeof(words[0]));
    } else if constexpr (kStochastic) {
      draw_pairs(draws, first_block, own, own + kThreads, words);
    }
#pragma unroll
    for (int u = 0; u < kShare; ++u) {
      const std::int64_t vector = own + u * kThreads;
      const Numbers<kWidth> numbers = numbers_of(held[i + u]);
      Extent extent;
#pragma unroll
      for (const float number : numbers.unit) {
        extent.include(number, symmetric);
      }
      const GridParams params = grid_of_lanes(matrix, extent.statistics(), lanes, num_bits);
      if (vector >= vectors) {
        continue;
      }
      if ((vector & (lanes - 1)) == 0) {
        store_parameters(matrix, params, vector >> shift);
      }
      const RowGrid grid = row_grid(params);
      Numbers<kWidth> results;
#pragma unroll
      for (int e = 0; e < kWidth; e += 2) {
        results.unit[e] = simulated<kStochastic, 0>(numbers.unit[e], grid, words[u][e / 2]);
        results.unit[e + 1] = simulated<kStochastic, 1>(numbers.unit[e + 1], grid, words[u][e / 2]);
      }
      write(blend_ratio, exists(params) && blend_ratio == 0.0F, numbers, results,
            output + vector * kWidth);
    }
  }
}

/// The same where there is no grid: a copy, or NaN.
template <typename Input, typename Output>
__device__ void write_tile(const FakeQuantizeTensor& matrix, std::int64_t tile, int num_bits,
                           float blend_ratio, const Step& step, std::uint32_t draw_step) {
  constexpr int kWidth = kLoadBytes / static_cast<int>(sizeof(Input));
  const std::int64_t vectors = matrix.rows * matrix.cols / kWidth;
  const std::int64_t lanes = columns_per_group(matrix) / kWidth;
  const std::int64_t first = tile * kTileVectors + static_cast<int>(threadIdx.x);
  for (int i = 0; i < kHeldVectors; ++i) {
    const std::int64_t vector = first + i * kThreads;
    if (vector >= vectors) {
      return;
    }
    if (num_bits != 0 && vector % lanes == 0) {
      store_parameters(matrix, no_grid(), vector / lanes);
    }
    Place place{.row = vector * kWidth / matrix.cols, .members = 1, .active = true};
    place.begin = vector * kWidth - place.row * matrix.cols;
    place.end = place.begin + kWidth;
    write_run<Input, Output>(matrix, place, num_bits, blend_ratio, step.seed, draw_step, no_grid());
  }
}

template <typename Input, typename Output, bool kStochastic>
__global__ void __launch_bounds__(kThreads, 4)
    groups_kernel(const __grid_constant__ Table table, const __grid_constant__ Step step,
                  const __grid_constant__ PhiloxKeys keys) {
  if (step.skip != nullptr && *step.skip != 0.0F) {
    return;
  }
  const auto draw_step = static_cast<std::uint32_t>(step.step != nullptr ? *step.step : 0);
  for_each_tile(table, [&](int tensor, std::int64_t tile) {
    const FakeQuantizeTensor& matrix = table.tensors[tensor];
    const int num_bits = step.num_bits[table.number[tensor]];
    const float blend_ratio =
        step.blend_ratio != nullptr ? step.blend_ratio[table.number[tensor]] : 0.0F;
    if (has_grid(matrix, num_bits)) {
      quantize_tile<Input, Output>(matrix, tile, num_bits, blend_ratio,
                                   Draws<kStochastic>(matrix, keys, draw_step));
    } else {
      write_tile<Input, Output>(matrix, tile, num_bits, blend_ratio, step, draw_step);
    }
  });
}

/// What a matrix needs a kernel of its own for.
struct Kind {
  DType input;
  DType output;
  Rounding rounding;

  bool operator==(const Kind&) const = default;
};

Kind kind_of(const FakeQuantizeTensor& matrix) {
  return {matrix.input_dtype, matrix.output_dtype, matrix.rounding};
}

}  // namespace

void fake_quantize_groups(const FakeQuantizeArgs& args, int multiprocessors, CUstream_st* stream) {
  const Step step = step_of(args);
  const auto launch_table = [&](const Kind& kind, const Table& table) {
    visit_float(kind.input, [&]<typename Input>(Input) {
      visit_float(kind.output, [&]<typename Output>(Output) {
        const auto kernel = kind.rounding == Rounding::kStochastic
                                ? groups_kernel<Input, Output, true>
                                : groups_kernel<Input, Output, false>;
        launch(kernel, table, step, multiprocessors, stream, philox_keys(args.seed));
      });
    });
  };
  for_each_kind(args.tensors, takes_groups, kind_of, launch_table, tiles_of);
}

}  // namespace moq::kernels::cuda
