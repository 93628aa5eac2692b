// INT8 quantization of activations, and dequantization of codes, on CUDA. Both are memory-bound:
// activations are read from device memory once (the second look at a row hits the caches).
#include <cuda_runtime.h>

#include "kernels/common/quantize_check.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/launch.h"
#include "kernels/quantize.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;
constexpr unsigned kMaxBlocks = 1U << 20;  // further rows and elements are taken in turn

// -------------------------------------------------------------------------------- device functions

/// What the grid of a row depends on, on every thread of the block.
template <typename Element>
__device__ GroupStatistics statistics_of(const Element* input, std::int64_t cols, QuantMode mode) {
  __shared__ int2 shared[kThreads / kWarpSize];
  GroupStatistics row;
  const auto add = [&row](std::int32_t lowest, std::int32_t highest) {
    row = {min(row.lowest, lowest), max(row.highest, highest)};
  };
  for (std::int64_t col = threadIdx.x; col < cols; col += kThreads) {
    const auto bits = std::bit_cast<std::int32_t>(to_float(input[col]));
    is_symmetric(mode) ? add(0, bits & kMagnitudeMask)
                       : add(ordered_bits(bits), ordered_bits(bits));
  }
  row = {__reduce_min_sync(0xffffffffU, row.lowest), __reduce_max_sync(0xffffffffU, row.highest)};
  if (threadIdx.x % kWarpSize == 0) {
    shared[threadIdx.x / kWarpSize] = {row.lowest, row.highest};
  }
  __syncthreads();
  for (const int2& warp : shared) {
    add(warp.x, warp.y);
  }
  __syncthreads();  // the next row writes `shared` again
  return row;
}

template <typename Element>
__device__ void quantize_row(const QuantizeActivationArgs& args, std::int64_t row) {
  const Element* input = static_cast<const Element*>(args.input) + row * args.row_stride;
  GridParams grid;
  if (args.static_scale != nullptr) {
    grid = static_grid(args);
  } else {
    grid = make_grid(statistics_of(input, args.cols, args.mode), 8, args.mode, DType::kFloat32);
    if (threadIdx.x == 0 && args.scales != nullptr) {
      args.scales[row] = grid.scale;
    }
    if (threadIdx.x == 0 && args.zero_points != nullptr) {
      args.zero_points[row] = grid.zero_point;
    }
  }
  const bool has_grid = exists(grid);
  for (std::int64_t col = threadIdx.x; col < args.cols; col += kThreads) {
    const float value = to_float(input[col]);
    const bool number = has_grid && value == value;
    const std::int32_t code = number ? quantize_one(value, grid, Rounding::kNearest, 0.0F) : 0;
    if (args.codes != nullptr) {
      args.codes[row * args.cols + col] = static_cast<std::int8_t>(code);
    }
    if (args.output != nullptr) {
      store_float(static_cast<Element*>(args.output) + row * args.cols + col,
                  number ? dequantize_one(code, grid) : std::bit_cast<float>(kQuietNaNBits));
    }
  }
}

// ----------------------------------------------------------------------------------------- kernels

/// A block takes a row at a time.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    quantize_activation_kernel(QuantizeActivationArgs args) {
  for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    quantize_row<Element>(args, row);
  }
}

/// A thread takes an element at a time.
template <typename Code, typename Scale, typename Output>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeArgs args) {
  const std::int64_t size = args.rows * args.cols;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += stride) {
    const std::int64_t row = i / args.cols;
    const std::int64_t col = i % args.cols;
    const std::int64_t group = group_of(args, row, col);
    GridParams grid{};
    grid.scale = to_float(static_cast<const Scale*>(args.scales)[group]);
    grid.zero_point = args.zero_points != nullptr ? args.zero_points[group] : 0;
    store_float(static_cast<Output*>(args.output) + row * args.row_stride + col * args.col_stride,
                canonical(dequantize_one(static_cast<const Code*>(args.codes)[i], grid)));
  }
}

// --------------------------------------------------------------------------------------- launchers

unsigned blocks_for(std::int64_t items) {
  return items < kMaxBlocks ? static_cast<unsigned>(items) : kMaxBlocks;
}

template <typename Code>
void launch_dequantize(const DequantizeArgs& args, unsigned blocks, cudaStream_t stream) {
  visit_float(args.scale_dtype, [&]<typename Scale>(Scale) {
    visit_float(args.output_dtype, [&]<typename Output>(Output) {
      launch_in_order(dequantize_kernel<Code, Scale, Output>, blocks, kThreads, stream, args);
    });
  });
}

}  // namespace

void quantize_activation(const QuantizeActivationArgs& args, CUstream_st* stream) {
  check_quantize_activation(args);
  if (args.rows == 0) {
    return;
  }
  visit_float(args.input_dtype, [&]<typename Element>(Element) {
    launch_in_order(quantize_activation_kernel<Element>, blocks_for(args.rows), kThreads, stream,
                    args);
  });
}

void dequantize(const DequantizeArgs& args, CUstream_st* stream) {
  check_dequantize(args);
  const std::int64_t size = args.rows * args.cols;
  if (size == 0) {
    return;
  }
  const unsigned blocks = blocks_for((size + kThreads - 1) / kThreads);
  if (args.codes_dtype == DType::kInt8) {
    launch_dequantize<std::int8_t>(args, blocks, stream);
  } else {
    launch_dequantize<std::int16_t>(args, blocks, stream);
  }
}

}  // namespace moq::kernels::cuda
