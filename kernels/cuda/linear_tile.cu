// More than eight tokens times a weight, on tensor cores by mma.sync (compute capability 8.0 on).
//
// A thread block multiplies kRowBlocks * 16 rows of the weight by a tile of tokens. The weight
// comes from device memory straight into the registers of the one warp that needs it, a step of
// columns ahead; the tokens, which all warps share, come through a ring in shared memory. Where the
// tiles are too few to fill the GPU, the columns are split over the blocks of a cluster, which add
// up what they have in each other's shared memory (9.0), in one order.
#include <cooperative_groups.h>
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
constexpr int kRowWarps = 4;
constexpr int kStepCols = 64;  // of the tokens' ring: 128 bytes of a token
constexpr int kChunks = 8;     // 16-byte chunks of a token's step
constexpr int kStages = 4;
constexpr std::int64_t kFewestSteps = 4;  // that a split is worth
constexpr int kMaxSplit = 8;

/// What a kernel is compiled for. Rows: kRowWarps warps, each with kRowBlocks blocks of 16. Tokens:
/// kTokenWarps warps, each with kTokenTiles tiles of 8.
template <bool kBFloat16_, int kElementBytes_, bool kGroups_, int kTokenWarps_, int kTokenTiles_>
struct Tile {
  static constexpr bool kBFloat16 = kBFloat16_;
  static constexpr int kElementBytes = kElementBytes_;
  static constexpr bool kGroups = kGroups_;
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kRowBlocks = kGroups ? 1 : 2;
  static constexpr int kThreads = kRowWarps * kTokenWarps * kWarpSize;
  static constexpr int kRows = kRowWarps * kRowBlocks * kBlockRows;
  static constexpr int kTokens = kTokenWarps * kTokenTiles * 8;
  static constexpr int kStepBlocks = kStepCols * kElementBytes / 32;
  static constexpr int kStageBytes = kTokens * kStepCols * 2;
  static constexpr int kResultStride = kRows + 4;  // floats, of a token in shared memory
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kTokens* kResultStride * 4);
};

/// Byte of a 16-byte chunk of a token within a stage. Chunks are exchanged so that the lanes of one
/// load, of two neighbouring tokens (or four, for 8-byte loads), meet all banks.
template <int kElementBytes>
__device__ int chunk_offset(int token, int chunk) {
  const int exchanged = kElementBytes == 1 ? chunk ^ (token & 1) << 2 : chunk ^ (token & 3) << 1;
  return token * kStepCols * 2 + exchanged * 16;
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads)
    tile_kernel(DeviceLinearArgs args, DeviceLayout layout, int steps) {
  extern __shared__ __align__(128) std::uint8_t shared[];
  constexpr int kTokenTiles = T::kTokenTiles;
  constexpr int kRowBlocks = T::kRowBlocks;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int row_warp = warp % kRowWarps;
  const int first_tile = warp / kRowWarps * kTokenTiles;
  const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.y) * T::kTokens;
  const std::int64_t first_row_block =
      (static_cast<std::int64_t>(blockIdx.x) * kRowWarps + row_warp) * kRowBlocks;
  const int first_step =
      static_cast<int>(static_cast<std::int64_t>(steps) * blockIdx.z / gridDim.z);
  const int last_step =
      static_cast<int>(static_cast<std::int64_t>(steps) * (blockIdx.z + 1) / gridDim.z);

  // ---- where this lane reads
  const auto* packed = static_cast<const std::uint8_t*>(args.weight.data);
  const auto load_weight = [&](int step, uint4(&bytes)[T::kStepBlocks][kRowBlocks]) {
#pragma unroll
    for (int i = 0; i < T::kStepBlocks; ++i) {
      const std::int64_t block = static_cast<std::int64_t>(step) * T::kStepBlocks + i;
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        const std::int64_t row_block = first_row_block + r;
        // What lies outside meets tokens of zero, or rows that are not written.
        bytes[i][r] = uint4{0, 0, 0, 0};
        if (step < last_step && block < layout.col_blocks && row_block < layout.row_blocks) {
          bytes[i][r] = load_once(reinterpret_cast<const uint4*>(packed) +
                                  (row_block * layout.col_blocks + block) * kWarpSize + lane);
        }
      }
    }
  };
  const auto* input = static_cast<const std::uint16_t*>(args.input);
  const auto fetch_tokens = [&](int step) {
    if (step < last_step) {
      std::uint8_t* stage = shared + step % kStages * T::kStageBytes;
      for (int i = static_cast<int>(threadIdx.x); i < T::kTokens * kChunks; i += T::kThreads) {
        const int token = i / kChunks;
        const int chunk = i % kChunks;
        const std::int64_t col = static_cast<std::int64_t>(step) * kStepCols + chunk * 8;
        const bool exists = first_token + token < args.m && col < layout.k;
        const std::uint16_t* source =
            exists ? input + (first_token + token) * args.input_stride + col : input;
        copy_async(shared_address(stage + chunk_offset<T::kElementBytes>(token, chunk)), source,
                   exists);
      }
    }
    close_async_group();
  };

  // ---- the columns
  float sums[kRowBlocks][kTokenTiles][4] = {};
  float totals[T::kGroups ? kRowBlocks : 1][T::kGroups ? kTokenTiles : 1][4] = {};
  Grids grids[kRowBlocks];
  const auto load_all_grids = [&](std::int64_t group) {
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
      const std::int64_t row_block = first_row_block + r;
      grids[r] = row_block < layout.row_blocks
                     ? load_grids<T::kBFloat16>(packed, layout, row_block, group, g)
                     : Grids{};
    }
  };
  if constexpr (T::kElementBytes == 1) {
    load_all_grids(0);
  } else {
#pragma unroll
    for (Grids& grid : grids) {
      grid = Grids{{1.0F, 1.0F}, {0, 0}};
    }
  }
  std::int64_t group = 0;

  uint4 bytes[T::kStepBlocks][kRowBlocks];
  load_weight(first_step, bytes);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    fetch_tokens(first_step + i);
  }
  for (int step = first_step; step < last_step; ++step) {
    wait_async_groups<kStages - 2>();
    __syncthreads();  // the step's tokens are there, and the stage of the step before is free
    fetch_tokens(step + kStages - 1);
    uint4 next_bytes[T::kStepBlocks][kRowBlocks];
    load_weight(step + 1, next_bytes);
    const std::uint8_t* stage = shared + step % kStages * T::kStageBytes;
#pragma unroll
    for (int i = 0; i < T::kStepBlocks; ++i) {
      if constexpr (T::kGroups) {
        const std::int64_t own = (static_cast<std::int64_t>(step) * T::kStepBlocks + i) *
                                 layout.block_cols / layout.group_size;
        if (own != group && own < layout.groups) {
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              totals[0][j][e] += sums[0][j][e] * grids[0].scale[e / 2];
              sums[0][j][e] = 0.0F;
            }
          }
          group = own;
          load_all_grids(group);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        const Fragments<T::kBFloat16, T::kElementBytes> weights(bytes[i][r], grids[r].zero);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          const int token = (first_tile + j) * 8 + g;
          if constexpr (T::kElementBytes == 1) {
            const auto x =
                *reinterpret_cast<const uint4*>(stage + chunk_offset<1>(token, 4 * i + t));
            multiply_accumulate<T::kBFloat16>(sums[r][j], weights.a[0], x.x, x.y);
            multiply_accumulate<T::kBFloat16>(sums[r][j], weights.a[1], x.z, x.w);
          } else {
            const auto x = *reinterpret_cast<const uint2*>(
                stage + chunk_offset<2>(token, 2 * i + t / 2) + t % 2 * 8);
            multiply_accumulate<T::kBFloat16>(sums[r][j], weights.a[0], x.x, x.y);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < T::kStepBlocks; ++i) {
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        bytes[i][r] = next_bytes[i][r];
      }
    }
  }

  // ---- the results, [token, row] in shared memory
  wait_async_groups<0>();
  __syncthreads();
  auto* results = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float sum = sums[r][j][e] * grids[r].scale[e / 2];
        if constexpr (T::kGroups) {
          sum += totals[0][j][e];
        }
        const int row = (row_warp * kRowBlocks + r) * kBlockRows + g + e / 2 * 8;
        const int token = (first_tile + j) * 8 + 2 * t + e % 2;
        results[token * T::kResultStride + row] = sum;
      }
    }
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  cluster.sync();
#else
  __syncthreads();
#endif
  // The blocks of a cluster share the tile's tokens.
  for (int i = static_cast<int>(threadIdx.x); i < T::kTokens * T::kRows; i += T::kThreads) {
    const int token = i / T::kRows;
    const int row = i % T::kRows;
    if (token % static_cast<int>(gridDim.z) != static_cast<int>(blockIdx.z)) {
      continue;
    }
    const std::int64_t to_token = first_token + token;
    const std::int64_t to_row = static_cast<std::int64_t>(blockIdx.x) * T::kRows + row;
    if (to_token >= args.m || to_row >= layout.n) {
      continue;
    }
    float sum = 0.0F;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    for (unsigned rank = 0; rank < gridDim.z; ++rank) {
      sum += cluster.map_shared_rank(results, rank)[token * T::kResultStride + row];
    }
#else
    sum = results[token * T::kResultStride + row];
#endif
    finish<typename ElementOf<T::kBFloat16>::Type>(args, to_token, to_row, sum);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cluster.sync();  // nobody leaves while others read
#endif
}

/// Blocks of a cluster that share the columns, so that the tiles fill the GPU.
int split_of(std::int64_t tiles, std::int64_t steps, std::int64_t multiprocessors) {
  int split = 1;
  while (split < kMaxSplit && tiles * split * 4 < multiprocessors * 3 &&
         steps / (2 * split) >= kFewestSteps) {
    split *= 2;
  }
  return split;
}

template <typename T>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  const auto kernel = tile_kernel<T>;
  MOQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes));
  const std::int64_t row_tiles = pad_to(layout.n, T::kRows) / T::kRows;
  const std::int64_t token_tiles = pad_to(args.m, T::kTokens) / T::kTokens;
  const std::int64_t steps = pad_to(layout.k, kStepCols) / kStepCols;
  const bool has_clusters = architecture_of(kernel) >= 90;
  const int split =
      has_clusters ? split_of(row_tiles * token_tiles, steps, device_limits().multiprocessors) : 1;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 1;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = static_cast<unsigned>(split);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(token_tiles),
                        static_cast<unsigned>(split));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = has_clusters ? 1 : 0;
  MOQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args, layout, static_cast<int>(steps)));
}

template <bool kBFloat16, int kElementBytes, bool kGroups>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  if (args.m <= 16) {
    return launch<Tile<kBFloat16, kElementBytes, kGroups, 1, 2>>(args, layout, stream);
  }
  if (args.m <= 32) {
    return launch<Tile<kBFloat16, kElementBytes, kGroups, 1, 4>>(args, layout, stream);
  }
  if (args.m <= 64) {
    return launch<Tile<kBFloat16, kElementBytes, kGroups, 1, 8>>(args, layout, stream);
  }
  launch<Tile<kBFloat16, kElementBytes, kGroups, 2, 8>>(args, layout, stream);
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

bool can_tile(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  return suits_tensor_cores(args, layout) && layout.k % 8 == 0 && args.input_stride % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(args.input) % 16 == 0;
}

void tile_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch<true>(args, layout, stream)
                                 : launch<false>(args, layout, stream);
}

}  // namespace moq::kernels::cuda
