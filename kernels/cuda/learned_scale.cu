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
#include "kernels/cuda/learned_scale_elements.h"
#include "kernels/cuda/ptx.h"
#include "kernels/learned_scale.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kStepsAtOnce = 4;                // of 64 columns
constexpr int kOwnLanes = kSumLanes / kWarps;  // sums of a thread, where columns are contiguous
constexpr unsigned kMaxBlocks = 1U << 20;      // further work is taken in turn
static_assert(kSumLanes == 2 * kWarpSize);

// -------------------------------------------------------------------------------- device functions

/// Stores the sum of a run, which is the group's if it has no other.
__device__ void store_sum(const LearnedScaleCall& call, const Runs& runs, const LearnedWidth& width,
                          std::int64_t run, float sum) {
  if (runs.per_group == 1) {
    call.grad_absmax[run] = by_absmax(sum, call.matrix, run, width);
  } else {
    call.sums[run] = sum;
  }
}

// ----------------------------------------------------------------------------------------- kernels

/// Steps of a run, 64 columns each: writes them and adds to a lane's sums. `count` are the columns
/// from the lane's first on; kWhole promises that there are all, and pairs where they are aligned,
/// so that all of the steps' loads are under way at once.
template <typename Element, Derivative kDerivative, int kSteps, bool kWhole>
__device__ void take_steps(const Element* weight, const Element* input, Element* output, int count,
                           const Group& group, const LearnedWidth& width, float2& sums) {
  float2 weights[kSteps];
  float2 inputs[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    weights[i] = load_two(weight + i * kSumLanes, count - i * kSumLanes, kWhole);
    inputs[i] = load_two(input + i * kSumLanes, count - i * kSumLanes, kWhole);
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    float2 addends;
    const float2 result{derive<kDerivative>(weights[i].x, inputs[i].x, group, width, addends.x),
                        derive<kDerivative>(weights[i].y, inputs[i].y, group, width, addends.y)};
    sums.x += addends.x;
    sums.y += addends.y;
    if (output != nullptr) {
      store_two(output + i * kSumLanes, count - i * kSumLanes, kWhole, result);
    }
  }
}

/// Rows are contiguous: a warp takes a run at a time.
template <typename Element, Derivative kDerivative>
__global__ void __launch_bounds__(kThreads) rows_kernel(LearnedScaleCall call, Runs runs) {
  wait_for_previous_kernels();
  allow_next_kernel();
  const FakeQuantizeTensor& matrix = call.matrix;
  const LearnedWidth width(*call.num_bits, call.blend_ratio);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (std::int64_t run = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
       run < matrix.rows * runs.per_row; run += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    const Quotient of_row = divide(run, runs.per_row);
    const Quotient of_group = divide(of_row.rest, runs.per_group_row);
    const std::int64_t row = of_row.whole;
    const std::int64_t first = of_group.rest * kSummedAtOnce;
    const auto size = static_cast<int>(min(kSummedAtOnce, runs.group_cols - first));
    const Group group = load_group<kDerivative>(call, runs.group_of(row, of_group.whole), width);
    const std::int64_t at =
        row * matrix.row_stride + of_group.whole * runs.group_cols + first + std::int64_t{2} * lane;
    const Element* weight = static_cast<const Element*>(matrix.input) + at;
    const Element* input = static_cast<const Element*>(call.input) + at;
    Element* output = call.output == nullptr ? nullptr : static_cast<Element*>(call.output) + at;
    const bool pairs = holds_pairs(weight) && holds_pairs(input) && holds_pairs(output);
    float2 sums{};
    for (int col = 0; col < size;) {
      const int count = size - col - 2 * lane;
      const bool whole = pairs && size - col >= kStepsAtOnce * kSumLanes;
      if (whole) {
        take_steps<Element, kDerivative, kStepsAtOnce, true>(weight, input, output, count, group,
                                                             width, sums);
      } else if (pairs && size - col >= kSumLanes) {
        take_steps<Element, kDerivative, 1, true>(weight, input, output, count, group, width, sums);
      } else {
        take_steps<Element, kDerivative, 1, false>(weight, input, output, count, group, width,
                                                   sums);
      }
      const int taken = whole ? kStepsAtOnce * kSumLanes : kSumLanes;
      col += taken;
      weight += taken;
      input += taken;
      output = output == nullptr ? nullptr : output + taken;
    }
    if constexpr (kDerivative == Derivative::kGradient) {
      const float sum = sum_in_halves(sums);
      if (lane == 0) {
        store_sum(call, runs, width, run, sum);
      }
    }
  }
}

/// A thread's columns among 64, `count` of them; kWhole promises all.
template <typename Element, Derivative kDerivative, bool kWhole>
__device__ void take_columns(const Element* weight, const Element* input, Element* output,
                             std::int64_t stride, std::int64_t count, const Group& group,
                             const LearnedWidth& width, float (&sums)[kOwnLanes]) {
  float weights[kOwnLanes];
  float inputs[kOwnLanes];
#pragma unroll
  for (int j = 0; j < kOwnLanes; ++j) {
    const bool exists = kWhole || j < count;
    weights[j] = exists ? number_of(weight[j * stride]) : 0.0F;
    inputs[j] = exists ? number_of(input[j * stride]) : 0.0F;
  }
#pragma unroll
  for (int j = 0; j < kOwnLanes; ++j) {
    float addend;
    const float result = derive<kDerivative>(weights[j], inputs[j], group, width, addend);
    sums[j] += addend;
    if (output != nullptr && (kWhole || j < count)) {
      round_to_element(result, output[j * stride]);
    }
  }
}

/// Columns are contiguous: a block takes a run of 32 rows at a time, warp w columns w, w + 8, …
template <typename Element, Derivative kDerivative>
__global__ void __launch_bounds__(kThreads) columns_kernel(LearnedScaleCall call, Runs runs) {
  __shared__ float shared[kSumLanes][kWarpSize];
  wait_for_previous_kernels();
  allow_next_kernel();
  const FakeQuantizeTensor& matrix = call.matrix;
  const LearnedWidth width(*call.num_bits, call.blend_ratio);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const std::int64_t row_tiles = divide_up(matrix.rows, kWarpSize);
  for (std::int64_t tile = blockIdx.x; tile < row_tiles * runs.per_row; tile += gridDim.x) {
    const Quotient of_tile = divide(tile, row_tiles);
    const Quotient of_run = divide(of_tile.whole, runs.per_group_row);
    const std::int64_t row = of_tile.rest * kWarpSize + lane;
    const std::int64_t run_of_row = of_tile.whole;
    const std::int64_t g = of_run.whole;
    const std::int64_t first = of_run.rest * kSummedAtOnce;
    const auto size = static_cast<int>(min(kSummedAtOnce, runs.group_cols - first));
    float sums[kOwnLanes] = {};
    if (row < matrix.rows) {
      const Group group = load_group<kDerivative>(call, runs.group_of(row, g), width);
      const std::int64_t at = row + (g * runs.group_cols + first + warp) * matrix.col_stride;
      const Element* weight = static_cast<const Element*>(matrix.input) + at;
      const Element* input = static_cast<const Element*>(call.input) + at;
      Element* output = call.output == nullptr ? nullptr : static_cast<Element*>(call.output) + at;
      const std::int64_t stride = kWarps * matrix.col_stride;  // to the thread's next column
      for (int col = warp; col < size; col += kSumLanes) {
        if (col - warp + kSumLanes <= size) {
          take_columns<Element, kDerivative, true>(weight, input, output, stride, kOwnLanes, group,
                                                   width, sums);
        } else {
          take_columns<Element, kDerivative, false>(
              weight, input, output, stride, divide_up(size - col, kWarps), group, width, sums);
        }
        weight += kOwnLanes * stride;
        input += kOwnLanes * stride;
        output = output == nullptr ? nullptr : output + kOwnLanes * stride;
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
    for (int i = 0; i < kSummedAtOnce / kSumLanes; ++i) {
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
  const Runs runs = runs_of(matrix);
  visit_float(matrix.input_dtype, [&]<typename Element>(Element) {
    if (rows_are_contiguous(matrix)) {
      launch(rows_kernel<Element, kDerivative>, blocks_for(matrix.rows * runs.per_row, kWarps),
             dim3(kThreads), 0, stream, call, runs);
    } else {
      launch(columns_kernel<Element, kDerivative>,
             blocks_for(divide_up(matrix.rows, kWarpSize) * runs.per_row, 1), dim3(kThreads), 0,
             stream, call, runs);
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
  check_learned_scale(args.point, args.grad_output != nullptr);
  const FakeQuantizeTensor& matrix = args.point.matrix;
  const std::int64_t groups = num_groups(matrix);
  MOQ_CHECK(args.grad_absmax != nullptr || groups == 0,
            "learned_scale: grad_absmax must not be null");
  MOQ_CHECK(args.workspace != nullptr || learned_scale_workspace_size(matrix) == 0,
            "learned_scale: workspace must not be null");
  if (matrix.rows == 0 || matrix.cols == 0) {
    MOQ_CUDA_CHECK(cudaMemsetAsync(args.grad_absmax, 0,
                                   static_cast<std::size_t>(groups) * sizeof(float), stream));
    return;
  }
  LearnedScaleCall call{.matrix = matrix,
                        .num_bits = args.point.num_bits,
                        .blend_ratio = args.point.blend_ratio,
                        .input = args.grad_output,
                        .absmax_tangent = nullptr,
                        .output = args.grad_weight,
                        .sums = static_cast<float*>(args.workspace),
                        .grad_absmax = args.grad_absmax};
  launch_elements<Derivative::kGradient>(call, stream);
  std::int64_t count = runs_of(matrix).per_group;
  float* other = call.sums + groups * count;
  while (count > 1) {
    const std::int64_t runs = divide_up(count, kSummedAtOnce);
    float* const results = runs == 1 ? args.grad_absmax : other;
    launch(sum_kernel, blocks_for(groups * runs, kWarps), dim3(kThreads), 0, stream, call, groups,
           count, results);
    other = call.sums;
    call.sums = results;
    count = runs;
  }
}

void learned_scale_tangent(const LearnedScaleTangentArgs& args, cudaStream_t stream) {
  check_learned_scale(args.point, args.weight_tangent != nullptr && args.output_tangent != nullptr);
  const FakeQuantizeTensor& matrix = args.point.matrix;
  MOQ_CHECK(args.absmax_tangent != nullptr || num_groups(matrix) == 0,
            "learned_scale: absmax_tangent must not be null");
  if (matrix.rows == 0 || matrix.cols == 0) {
    return;
  }
  launch_elements<Derivative::kTangent>({.matrix = matrix,
                                         .num_bits = args.point.num_bits,
                                         .blend_ratio = args.point.blend_ratio,
                                         .input = args.weight_tangent,
                                         .absmax_tangent = args.absmax_tangent,
                                         .output = args.output_tangent},
                                        stream);
}

}  // namespace moq::kernels::cuda
