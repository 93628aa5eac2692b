// Up to eight tokens times a weight, at the speed of reading the weight (compute capability 9.0).
//
// The weight's 16 rows are the M side of mma.m16n8k16 and the tokens its N side, so that one token
// costs what eight do. Every warp streams its own part of the columns through a ring of bulk copies
// in shared memory; its blocks lie one after the other in device memory, and the ring runs on from
// one block of rows to the next. What the warps of a block have summed is added up in shared
// memory. Nothing waits for another block of the grid, and the ring is filled before the kernels
// ahead in the stream have ended.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/ptx.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
constexpr int kPieceBlocks = 4;  // of one bulk copy: 2 KB
constexpr int kStages = 3;       // of a warp's ring; four blocks of the grid share a multiprocessor
constexpr int kRingBytes = kWarps * kStages * kPieceBlocks * kBlockBytes;
constexpr int kSumsBytes = 2 * kWarps * kBlockRows * (kStreamTokens + 1) * 4;
/// Input rows up to this size are kept in shared memory; larger ones are read through the caches.
constexpr std::int64_t kMaxInputBytes = 96 << 10;

/// Elements from one input row to the next in shared memory: the lanes of a load then meet all
/// banks. Lanes of two neighbouring rows (or four, of 8-byte loads) load together.
template <int kElementBytes>
__host__ __device__ constexpr std::int64_t staged_stride(std::int64_t cols) {
  return pad_to(cols, 64) + (kElementBytes == 1 ? 32 : 16);
}

/// Whole input rows in shared memory, zeros behind their ends.
template <typename Bits>
__device__ void stage_input(const DeviceLinearArgs& args, const DeviceLayout& layout,
                            std::int64_t stride, Bits* staged) {
  const auto* input = static_cast<const Bits*>(args.input);
  const std::int64_t cols = layout.col_blocks * layout.block_cols;
  const bool whole =
      (layout.k | args.input_stride) % 8 == 0 && reinterpret_cast<std::uintptr_t>(input) % 16 == 0;
  const std::int64_t step = whole ? 8 : 1;
  for (std::int64_t row = 0; row < args.m; ++row) {
    for (std::int64_t col = threadIdx.x * step; col < cols; col += kWarps * kWarpSize * step) {
      const Bits* source = input + row * args.input_stride + col;
      Bits* target = staged + row * stride + col;
      if (whole) {
        *reinterpret_cast<uint4*>(target) =
            col < layout.k ? *reinterpret_cast<const uint4*>(source) : uint4{0, 0, 0, 0};
      } else {
        *target = col < layout.k ? *source : Bits{0};
      }
    }
  }
}

/// kElementBytes is 1 for integer weights and 2 for weights of the input's dtype; kGroups: a row
/// has several scales, each of whole blocks; kStaged: the input lies in shared memory.
template <bool kBFloat16, int kElementBytes, bool kGroups, bool kStaged>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    stream_kernel(DeviceLinearArgs args, DeviceLayout layout) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kLaneInputs = 8 / kElementBytes;  // neighbouring columns that a lane multiplies
  extern __shared__ __align__(128) std::uint8_t shared[];
  __shared__ std::uint64_t barriers[kWarps][kStages];
  __shared__ float partial[2][kWarps][kBlockRows][kStreamTokens + 1];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;

  const auto part_of = [](std::int64_t size, int i, int parts) { return size * i / parts; };
  const auto first_rows = part_of(layout.row_blocks, blockIdx.x, gridDim.x);
  const auto last_rows = part_of(layout.row_blocks, blockIdx.x + 1, gridDim.x);
  const int first_block = static_cast<int>(part_of(layout.col_blocks, warp, kWarps));
  const int last_block = static_cast<int>(part_of(layout.col_blocks, warp + 1, kWarps));
  const int pieces = (last_block - first_block + kPieceBlocks - 1) / kPieceBlocks;

  std::uint8_t* ring = shared + warp * (kStages * kPieceBlocks * kBlockBytes);
  const auto* weight = static_cast<const std::uint8_t*>(args.weight.data);
  std::int64_t next_rows = first_rows;
  int next_piece = 0;
  const auto fill = [&](int stage) {
    if (next_rows == last_rows || pieces == 0) {
      return;
    }
    const int block = first_block + next_piece * kPieceBlocks;
    const int count = min(kPieceBlocks, last_block - block);
    if (lane == 0) {
      bulk_copy(shared_address(ring + stage * kPieceBlocks * kBlockBytes),
                weight + (next_rows * layout.col_blocks + block) * kBlockBytes,
                static_cast<std::uint32_t>(count * kBlockBytes),
                shared_address(&barriers[warp][stage]));
    }
    if (++next_piece == pieces) {
      next_piece = 0;
      ++next_rows;
    }
  };
  if (lane == 0) {
    for (std::uint64_t& barrier : barriers[warp]) {
      init_barrier(shared_address(&barrier));
    }
    publish_barriers();
  }
  __syncwarp();
  if (!args.weight_is_ready) {
    wait_for_previous_kernels();
  }
  for (int stage = 0; stage < kStages; ++stage) {
    fill(stage);
  }
  allow_next_kernel();
  wait_for_previous_kernels();

  const std::int64_t stride = kStaged ? staged_stride<kElementBytes>(layout.k) : args.input_stride;
  const auto* input = static_cast<const std::uint16_t*>(args.input);
  if constexpr (kStaged) {
    auto* staged = reinterpret_cast<std::uint16_t*>(shared + kRingBytes);
    stage_input(args, layout, stride, staged);
    input = staged;
  }
  __syncthreads();
  const bool is_token = g < args.m;
  input += (is_token ? g : 0) * stride + t * kLaneInputs;

  int stage = 0;
  std::uint32_t parity = 0;
  for (std::int64_t rows = first_rows; rows < last_rows; ++rows) {
    float totals[4] = {};   // of finished groups, scaled
    float sums[2][4] = {};  // two chains of products
    Grids grids{{1.0F, 1.0F}, {0, 0}};
    std::int64_t group = -1;
    if constexpr (kElementBytes == 1 && !kGroups) {
      grids = load_grids<kBFloat16>(args.weight.data, layout, rows, 0, g);
    }
    const auto add_scaled = [&] {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        totals[i] += (sums[0][i] + sums[1][i]) * grids.scale[i / 2];
        sums[0][i] = sums[1][i] = 0.0F;
      }
    };
    for (int piece = 0; piece < pieces; ++piece) {
      const int first = first_block + piece * kPieceBlocks;
      wait_barrier(shared_address(&barriers[warp][stage]), parity);
#pragma unroll
      for (int j = 0; j < kPieceBlocks; ++j) {
        const int block = first + j;
        if (block < last_block) {
          if constexpr (kGroups) {
            const std::int64_t own =
                static_cast<std::int64_t>(block) * layout.block_cols / layout.group_size;
            if (own != group) {
              add_scaled();
              group = own;
              grids = load_grids<kBFloat16>(args.weight.data, layout, rows, group, g);
            }
          }
          const auto bytes =
              reinterpret_cast<const uint4*>(ring + (stage * kPieceBlocks + j) * kBlockBytes)[lane];
          const std::uint16_t* columns = input + block * layout.block_cols;
          if constexpr (kElementBytes == 1) {
            uint4 x{0, 0, 0, 0};
            if (kStaged || is_token) {
              x = *reinterpret_cast<const uint4*>(columns);
            }
            if (!is_token) {
              x = uint4{0, 0, 0, 0};
            }
            const Fragments<kBFloat16, 1> weights(bytes, grids.zero);
            multiply_accumulate<kBFloat16>(sums[0], weights.a[0], x.x, x.y);
            multiply_accumulate<kBFloat16>(sums[1], weights.a[1], x.z, x.w);
          } else {
            uint2 x{0, 0};
            if (kStaged || is_token) {
              x = *reinterpret_cast<const uint2*>(columns);
            }
            if (!is_token) {
              x = uint2{0, 0};
            }
            const Fragments<kBFloat16, 2> weights(bytes, grids.zero);
            multiply_accumulate<kBFloat16>(sums[j % 2], weights.a[0], x.x, x.y);
          }
        }
      }
      __syncwarp();
      fill(stage);
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1U;
      }
    }
    add_scaled();
    float(&own)[kBlockRows][kStreamTokens + 1] = partial[rows % 2][warp];
    own[g][2 * t] = totals[0];
    own[g][2 * t + 1] = totals[1];
    own[g + 8][2 * t] = totals[2];
    own[g + 8][2 * t + 1] = totals[3];
    // The next block of rows writes the other half of `partial`, so one barrier suffices.
    __syncthreads();
    const int row_in_block = static_cast<int>(threadIdx.x) % kBlockRows;
    const int token = static_cast<int>(threadIdx.x) / kBlockRows;
    const std::int64_t row = rows * kBlockRows + row_in_block;
    if (token < args.m && row < layout.n) {
      float sum = 0.0F;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        sum += partial[rows % 2][i][row_in_block][token];
      }
      finish<typename ElementOf<kBFloat16>::Type>(args, token, row, sum);
    }
  }
#endif
}

static_assert(kWarps * kWarpSize >= kBlockRows * kStreamTokens, "a thread for every result");

bool uses_staging(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  return args.m * (layout.k + 96) * 2 <= kMaxInputBytes;
}

template <bool kBFloat16, int kElementBytes, bool kGroups, bool kStaged>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  const auto kernel = stream_kernel<kBFloat16, kElementBytes, kGroups, kStaged>;
  const std::int64_t input_bytes =
      kStaged ? args.m * staged_stride<kElementBytes>(layout.k) * 2 : 0;
  const auto shared_bytes = static_cast<std::size_t>(kRingBytes + input_bytes);
  MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(kRingBytes + kMaxInputBytes)));
  const DeviceLimits limits = device_limits();
  const std::int64_t taken = static_cast<std::int64_t>(shared_bytes) + kSumsBytes + 2048;
  const std::int64_t per_multiprocessor =
      std::clamp<std::int64_t>(limits.shared_bytes_per_multiprocessor / taken, 1, 4);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(
      std::min(layout.row_blocks, per_multiprocessor * limits.multiprocessors)));
  config.blockDim = dim3(kWarps * kWarpSize);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  MOQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args, layout));
}

template <bool kBFloat16, int kElementBytes, bool kGroups>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  uses_staging(args, layout)
      ? launch<kBFloat16, kElementBytes, kGroups, true>(args, layout, stream)
      : launch<kBFloat16, kElementBytes, kGroups, false>(args, layout, stream);
}

template <bool kBFloat16>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  if (layout.element_bytes == 2) {
    return launch<kBFloat16, 2, false>(args, layout, stream);
  }
  layout.groups == 1 ? launch<kBFloat16, 1, false>(args, layout, stream)
                     : launch<kBFloat16, 1, true>(args, layout, stream);
}

}  // namespace

bool can_stream(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  const bool reads_vectors = uses_staging(args, layout) ||
                             (layout.k % layout.block_cols == 0 && args.input_stride % 8 == 0 &&
                              reinterpret_cast<std::uintptr_t>(args.input) % 16 == 0);
  return args.m <= kStreamTokens && suits_tensor_cores(args, layout) && reads_vectors &&
         architecture_of(stream_kernel<false, 1, false, true>) >= 90;
}

void stream_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch<true>(args, layout, stream)
                                 : launch<false>(args, layout, stream);
}

}  // namespace moq::kernels::cuda
