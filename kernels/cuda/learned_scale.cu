// Derivatives of learned step sizes on CUDA: memory-bound, weight and gradient are read once and
// the weight's gradient is written once.
//
// Where rows are contiguous, a warp takes a run of one row, a lane two neighbouring columns of 64;
// where columns are, a block takes a run of 32 rows, a lane one of them, so that a warp reads 32
// neighbours either way. What a run adds up to goes to memory, and further launches add up those of
// a group, 512 at a time: nothing depends on the order in which blocks run.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/common/learned_scale_pieces.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"
#include "kernels/learned_scale.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSteps = static_cast<int>(kSummedAtOnce) / kSumLanes;  // of a whole run
constexpr int kOwnLanes = kSumLanes / kWarps;  // sums of a thread, where columns are contiguous
constexpr unsigned kMaxBlocks = 1U << 20;      // further work is taken in turn
static_assert(kSumLanes == 2 * kWarpSize);

// -------------------------------------------------------------------------------- device functions

/// The grid of one group, and the direction of its step size.
struct Group {
  float inverse_scale;
  float qmax;
  float direction;
};

template <Derivative kDerivative>
__device__ Group load_group(const LearnedScaleCall& call, std::int64_t group,
                            const LearnedWidth& width) {
  const GridParams grid = learned_grid(call.matrix, group, width);
  const float direction = kDerivative == Derivative::kTangent
                              ? by_absmax(call.input_absmax[group], call.matrix, group, width)
                              : 0.0F;
  return {grid.inverse_scale, static_cast<float>(grid.range.qmax), direction};
}

/// An element of what is written; `addend` is what it adds to the sums.
template <Derivative kDerivative>
__device__ float derive(float weight, float input, const Group& group, const LearnedWidth& width,
                        float& addend) {
  addend = 0.0F;
  if (width.copies()) {
    return input;
  }
  const float position = weight * group.inverse_scale;
  const float rounded = rintf(position);
  const bool inside = fabsf(rounded) <= group.qmax;
  const float below = position < 0.0F ? -group.qmax : position;  // or a NaN
  const float slope = inside ? rounded - position : (position > 0.0F ? group.qmax : below);
  const float through_grid = input * (inside ? 1.0F : 0.0F);
  const float result =
      width.blend == 0.0F ? through_grid : input * width.blend + through_grid * width.grid_share;
  if constexpr (kDerivative == Derivative::kTangent) {
    return result + slope * group.direction;
  }
  addend = input * slope;
  return result;
}

/// The sum of 64 numbers in halves, of which a lane has two neighbours, on lane 0.
__device__ float sum_in_halves(float2 own) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    own.x += __shfl_down_sync(0xffffffffU, own.x, distance);
    own.y += __shfl_down_sync(0xffffffffU, own.y, distance);
  }
  return own.x + own.y;
}

/// Stores the sum of a run, which is the group's if it has no other.
__device__ void store_sum(const LearnedScaleCall& call, const Runs& runs, const LearnedWidth& width,
                          std::int64_t run, float sum) {
  if (runs.per_group == 1) {
    call.to_absmax[run] = by_absmax(sum, call.matrix, run, width);
  } else {
    call.sums[run] = sum;
  }
}

template <typename Element>
__device__ bool holds_pairs(const Element* address) {
  return reinterpret_cast<std::uintptr_t>(address) % (2 * sizeof(Element)) == 0;
}

/// Two neighbouring elements; those from `count` on are 0.
template <typename Element>
__device__ float2 load_two(const Element* address, int count, bool as_pair) {
  if (as_pair) {
    const Numbers<2> numbers = numbers_of(load_vector<2>(address));
    return {numbers.unit[0], numbers.unit[1]};
  }
  return {count > 0 ? number_of(address[0]) : 0.0F, count > 1 ? number_of(address[1]) : 0.0F};
}

template <typename Element>
__device__ void store_two(Element* address, int count, bool as_pair, float2 numbers) {
  if (as_pair) {
    store_vector(address, rounded<Element>(Numbers<2>{{numbers.x, numbers.y}}));
    return;
  }
  if (count > 0) {
    round_to_element(numbers.x, address[0]);
  }
  if (count > 1) {
    round_to_element(numbers.y, address[1]);
  }
}

// ----------------------------------------------------------------------------------------- kernels

/// Rows are contiguous: a warp takes a run at a time.
template <typename Element, Derivative kDerivative>
__global__ void __launch_bounds__(kThreads) rows_kernel(LearnedScaleCall call) {
  wait_for_previous_kernels();
  allow_next_kernel();
  const FakeQuantizeTensor& matrix = call.matrix;
  const Runs runs = runs_of(matrix);
  const LearnedWidth width(*call.num_bits, call.blend_ratio);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (std::int64_t run = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
       run < matrix.rows * runs.per_row; run += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const std::int64_t row = run / runs.per_row;
    const std::int64_t g = run % runs.per_row / runs.per_group_row;
    const std::int64_t first = run % runs.per_group_row * kSummedAtOnce;
    const auto size = static_cast<int>(min(kSummedAtOnce, runs.group_cols - first));
    const Group group = load_group<kDerivative>(call, runs.group_of(row, g), width);
    const std::int64_t at =
        row * matrix.row_stride + g * runs.group_cols + first + std::int64_t{2} * lane;
    const Element* weight = static_cast<const Element*>(matrix.input) + at;
    const Element* input = static_cast<const Element*>(call.input) + at;
    Element* output = static_cast<Element*>(call.output) + at;
    const bool pairs = holds_pairs(weight) && holds_pairs(input) && holds_pairs(output);
    float2 weights[kSteps];
    float2 inputs[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int count = size - i * kSumLanes - 2 * lane;
      weights[i] = load_two(weight + i * kSumLanes, count, pairs && count > 1);
      inputs[i] = load_two(input + i * kSumLanes, count, pairs && count > 1);
    }
    float2 sums{};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int count = size - i * kSumLanes - 2 * lane;
      float2 addends;
      const float2 result{derive<kDerivative>(weights[i].x, inputs[i].x, group, width, addends.x),
                          derive<kDerivative>(weights[i].y, inputs[i].y, group, width, addends.y)};
      sums.x += addends.x;
      sums.y += addends.y;
      if (call.output != nullptr) {
        store_two(output + i * kSumLanes, count, pairs && count > 1, result);
      }
    }
    if constexpr (kDerivative == Derivative::kGradient) {
      const float sum = sum_in_halves(sums);
      if (lane == 0) {
        store_sum(call, runs, width, run, sum);
      }
    }
  }
}

/// Columns are contiguous: a block takes a run of 32 rows at a time, warp w columns w, w + 8, …
template <typename Element, Derivative kDerivative>
__global__ void __launch_bounds__(kThreads) columns_kernel(LearnedScaleCall call) {
  __shared__ float shared[kSumLanes][kWarpSize];
  wait_for_previous_kernels();
  allow_next_kernel();
  const FakeQuantizeTensor& matrix = call.matrix;
  const Runs runs = runs_of(matrix);
  const LearnedWidth width(*call.num_bits, call.blend_ratio);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t row_tiles = divide_up(matrix.rows, kWarpSize);
  for (std::int64_t tile = blockIdx.x; tile < row_tiles * runs.per_row; tile += gridDim.x) {
    const std::int64_t row = tile % row_tiles * kWarpSize + lane;
    const std::int64_t run_of_row = tile / row_tiles;
    const std::int64_t g = run_of_row / runs.per_group_row;
    const std::int64_t first = run_of_row % runs.per_group_row * kSummedAtOnce;
    const auto size = static_cast<int>(min(kSummedAtOnce, runs.group_cols - first));
    float sums[kOwnLanes] = {};
    if (row < matrix.rows) {
      const Group group = load_group<kDerivative>(call, runs.group_of(row, g), width);
      const std::int64_t at = row + (g * runs.group_cols + first) * matrix.col_stride;
      const Element* weight = static_cast<const Element*>(matrix.input) + at;
      const Element* input = static_cast<const Element*>(call.input) + at;
      Element* output = static_cast<Element*>(call.output) + at;
      for (int i = 0; i < size; i += kSumLanes) {
        float weights[kOwnLanes];
        float inputs[kOwnLanes];
#pragma unroll
        for (int j = 0; j < kOwnLanes; ++j) {
          const int col = i + j * kWarps + warp;
          weights[j] = col < size ? number_of(weight[col * matrix.col_stride]) : 0.0F;
          inputs[j] = col < size ? number_of(input[col * matrix.col_stride]) : 0.0F;
        }
#pragma unroll
        for (int j = 0; j < kOwnLanes; ++j) {
          const int col = i + j * kWarps + warp;
          float addend;
          const float result = derive<kDerivative>(weights[j], inputs[j], group, width, addend);
          sums[j] += addend;
          if (call.output != nullptr && col < size) {
            round_to_element(result, output[col * matrix.col_stride]);
          }
        }
      }
    }
    if constexpr (kDerivative == Derivative::kGradient) {
#pragma unroll
      for (int j = 0; j < kOwnLanes; ++j) {
        shared[j * kWarps + warp][lane] = sums[j];
      }
#pragma unroll
      for (int half = kSumLanes / 2; half > 0; half /= 2) {
        __syncthreads();
        for (int i = warp; i < half; i += kWarps) {
          shared[i][lane] += shared[i + half][lane];
        }
      }
      if (warp == 0 && row < matrix.rows) {
        store_sum(call, runs, width, row * runs.per_row + run_of_row, shared[0][lane]);
      }
      __syncthreads();  // the next tile writes `shared` again
    }
  }
}

/// Adds up runs of 512 of each group's `count` numbers: a warp takes one at a time. The last such
/// launch, which leaves one number a group, makes gradients of them.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(LearnedScaleCall call, std::int64_t groups, std::int64_t count, float* results) {
  wait_for_previous_kernels();
  allow_next_kernel();
  const LearnedWidth width(*call.num_bits, call.blend_ratio);
  const std::int64_t runs = divide_up(count, kSummedAtOnce);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (std::int64_t run = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
       run < groups * runs; run += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const std::int64_t group = run / runs;
    const std::int64_t first = run % runs * kSummedAtOnce;
    const auto size = static_cast<int>(min(kSummedAtOnce, count - first));
    const float* numbers = call.sums + group * count + first;
    float2 sums{};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int at = i * kSumLanes + 2 * lane;
      const float2 two = load_two(numbers + at, size - at, false);
      sums.x += two.x;
      sums.y += two.y;
    }
    const float sum = sum_in_halves(sums);
    if (lane == 0) {
      results[run] = runs == 1 ? by_absmax(sum, call.matrix, group, width) : sum;
    }
  }
}

// --------------------------------------------------------------------------------------- launchers

dim3 blocks_for(std::int64_t items, std::int64_t items_of_block) {
  return dim3(
      static_cast<unsigned>(std::min<std::int64_t>(divide_up(items, items_of_block), kMaxBlocks)));
}

template <Derivative kDerivative>
void launch_elements(const LearnedScaleCall& call, cudaStream_t stream) {
  const FakeQuantizeTensor& matrix = call.matrix;
  const std::int64_t runs = runs_of(matrix).per_row;
  visit_float(matrix.input_dtype, [&]<typename Element>(Element) {
    if (has_contiguous_rows(matrix)) {
      launch(rows_kernel<Element, kDerivative>, blocks_for(matrix.rows * runs, kWarps),
             dim3(kThreads), 0, stream, call);
    } else {
      launch(columns_kernel<Element, kDerivative>,
             blocks_for(divide_up(matrix.rows, kWarpSize) * runs, 1), dim3(kThreads), 0, stream,
             call);
    }
  });
}

}  // namespace

std::size_t learned_scale_workspace_size(const FakeQuantizeTensor& matrix) {
  const std::int64_t per_group = runs_of(matrix).per_group;
  if (matrix.rows == 0 || per_group <= 1) {
    return 0;
  }
  // The sums of all runs, and what the first further launch makes of them, if that is not the end.
  const std::int64_t next = divide_up(per_group, kSummedAtOnce);
  return static_cast<std::size_t>(num_groups(matrix) * (per_group + (next > 1 ? next : 0))) *
         sizeof(float);
}

void learned_scale_gradient(const LearnedScaleGradientArgs& args, cudaStream_t stream) {
  check_learned_scale(args.at, args.output != nullptr);
  const FakeQuantizeTensor& matrix = args.at.matrix;
  const std::int64_t groups = num_groups(matrix);
  MOQ_CHECK(args.absmax != nullptr || groups == 0, "learned_scale: absmax must not be null");
  MOQ_CHECK(args.workspace != nullptr || learned_scale_workspace_size(matrix) == 0,
            "learned_scale: workspace must not be null");
  if (matrix.rows == 0 || matrix.cols == 0) {
    MOQ_CUDA_CHECK(
        cudaMemsetAsync(args.absmax, 0, static_cast<std::size_t>(groups) * sizeof(float), stream));
    return;
  }
  LearnedScaleCall call{.matrix = matrix,
                        .num_bits = args.at.num_bits,
                        .blend_ratio = args.at.blend_ratio,
                        .input = args.output,
                        .input_absmax = nullptr,
                        .output = args.weight,
                        .sums = static_cast<float*>(args.workspace),
                        .to_absmax = args.absmax};
  launch_elements<Derivative::kGradient>(call, stream);
  std::int64_t count = runs_of(matrix).per_group;
  float* other = call.sums + groups * count;
  while (count > 1) {
    const std::int64_t runs = divide_up(count, kSummedAtOnce);
    float* const results = runs == 1 ? args.absmax : other;
    launch(sum_kernel, blocks_for(groups * runs, kWarps), dim3(kThreads), 0, stream, call, groups,
           count, results);
    other = call.sums;
    call.sums = results;
    count = runs;
  }
}

void learned_scale_tangent(const LearnedScaleTangentArgs& args, cudaStream_t stream) {
  check_learned_scale(args.at, args.weight != nullptr && args.output != nullptr);
  const FakeQuantizeTensor& matrix = args.at.matrix;
  MOQ_CHECK(args.absmax != nullptr || num_groups(matrix) == 0,
            "learned_scale: absmax must not be null");
  if (matrix.rows == 0 || matrix.cols == 0) {
    return;
  }
  launch_elements<Derivative::kTangent>({.matrix = matrix,
                                         .num_bits = args.at.num_bits,
                                         .blend_ratio = args.at.blend_ratio,
                                         .input = args.weight,
                                         .input_absmax = args.absmax,
                                         .output = args.output},
                                        stream);
}

}  // namespace moq::kernels::cuda
