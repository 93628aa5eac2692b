// More than a few tokens times a weight, on tensor cores by mma.sync (compute capability 8.0 on).
//
// A thread block multiplies a tile of the weight's rows by a tile of tokens. Both come through one
// ring in shared memory, a step of columns a stage; the weight's stages are requested before the
// kernels ahead in the stream have ended (9.0). Where the tiles are too few to fill the GPU, the
// columns are split over the blocks of a cluster, which add up what they have in each other's
// shared memory (9.0), in one order.
#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/ptx.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kMaxStages = 8;
/// Bytes of shared memory with which two blocks share a multiprocessor.
constexpr int kTwoBlocks = 112 << 10;
constexpr std::int64_t kFewestSteps = 2;  // that a split is worth
constexpr int kMaxSplit = 8;

/// How a block's warps share a tile: kRowWarps * kTokenWarps of them lie side by side, each with
/// kRowBlocks blocks of 16 rows and kTokenTiles tiles of 8 tokens, and kColWarps share the columns
/// of a step.
template <int kRowWarps_, int kTokenWarps_, int kColWarps_, int kRowBlocks_, int kTokenTiles_,
          int kShared_>
struct Arrangement {
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kColWarps = kColWarps_;
  static constexpr int kRowBlocks = kRowBlocks_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kShared = kShared_;  // bytes that the ring may take where a block has them
  static constexpr int kThreads = kRowWarps * kTokenWarps * kColWarps * kWarpSize;
};

/// kRingBytes: the most that the ring may take.
template <bool kBFloat16_, int kElementBytes_, bool kGroups_, typename A, int kRingBytes>
struct Tile : A {
  static constexpr bool kBFloat16 = kBFloat16_;
  static constexpr int kElementBytes = kElementBytes_;
  static constexpr bool kGroups = kGroups_;
  using Element = typename ElementOf<kBFloat16>::Type;
  static constexpr int kRowBlocks = kGroups ? A::kRowBlocks / 2 : A::kRowBlocks;  // registers
  static constexpr int kAllRowBlocks = A::kRowWarps * kRowBlocks;
  static constexpr int kRows = kAllRowBlocks * kBlockRows;
  static constexpr int kTokens = A::kTokenWarps * A::kTokenTiles * 8;
  static constexpr int kStepCols = 128 / kElementBytes;  // columns of a stage
  static constexpr int kChunks = kStepCols / 8;          // 16-byte chunks of a token's step
  static constexpr int kStepBlocks = 4;
  static constexpr int kWeightBytes = kAllRowBlocks * kStepBlocks * kBlockBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kStepCols * 2;
  static constexpr int kStages = std::clamp(kRingBytes / kStageBytes, 2, kMaxStages);
  static constexpr int kResultStride = kRows + 4;  // floats, of a token in shared memory
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kTokens* kResultStride * 4);
  static_assert(kStepBlocks % A::kColWarps == 0);
};

/// Byte of a 16-byte chunk of a token within a stage. Chunks are exchanged so that the same one of
/// eight neighbouring tokens, a matrix that is loaded at once, meets all banks.
template <typename T>
__device__ int chunk_offset(int token, int chunk) {
  return token * T::kStepCols * 2 + (chunk ^ (token & 7)) * 16;
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kSharedBytes > kTwoBlocks ? 1 : 2)
    tile_kernel(DeviceLinearArgs args, DeviceLayout layout, int steps) {
  extern __shared__ __align__(128) std::uint8_t shared[];
  constexpr int kTokenTiles = T::kTokenTiles;
  constexpr int kRowBlocks = T::kRowBlocks;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int row_warp = warp % T::kRowWarps;
  const int first_tile = warp / T::kRowWarps % T::kTokenWarps * kTokenTiles;
  const int col_warp = warp / (T::kRowWarps * T::kTokenWarps);
  const int split = static_cast<int>(gridDim.z);
  const int part = static_cast<int>(blockIdx.z);
  const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.y) * T::kTokens;
  const std::int64_t tile_row_block = static_cast<std::int64_t>(blockIdx.x) * T::kAllRowBlocks;
  const std::int64_t first_row_block = tile_row_block + row_warp * kRowBlocks;
  const int first_step = static_cast<int>(static_cast<std::int64_t>(steps) * part / split);
  const int own_steps =
      static_cast<int>(static_cast<std::int64_t>(steps) * (part + 1) / split) - first_step;

  // ---- the ring. Every thread copies its chunks of 16 bytes of one step after the other.
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kRowChunks = T::kStepBlocks * kWarpSize;  // of a block of rows in a step
  constexpr int kRowBlocksAtOnce = T::kThreads / kRowChunks;
  static_assert(T::kAllRowBlocks % kRowBlocksAtOnce == 0);
  const auto* packed = static_cast<const std::uint8_t*>(args.weight.data);
  const std::int64_t row_bytes = layout.col_blocks * kBlockBytes;
  const int own_row_block = thread / kRowChunks;
  const int row_blocks_left = static_cast<int>(layout.row_blocks - tile_row_block) - own_row_block;
  int chunks_left = static_cast<int>(layout.col_blocks) * kWarpSize - first_step * kRowChunks -
                    thread % kRowChunks;
  const std::uint8_t* weight_source =
      packed + (tile_row_block + own_row_block) * row_bytes +
      (static_cast<std::int64_t>(first_step) * kRowChunks + thread % kRowChunks) * 16;
  const auto fetch_weight = [&](int stage) {
    const std::uint32_t to = shared_address(shared + stage * T::kStageBytes) + thread * 16;
    const std::uint8_t* source = weight_source;
#pragma unroll
    for (int r = 0; r < T::kAllRowBlocks; r += kRowBlocksAtOnce) {
      // What lies outside meets tokens of zero, or rows that are not written.
      const bool exists = r < row_blocks_left && chunks_left > 0;
      copy_async(to + r * kRowChunks * 16, exists ? source : packed, exists);
      source += kRowBlocksAtOnce * row_bytes;
    }
    weight_source += kRowChunks * 16;
    chunks_left -= kRowChunks;
  };
  constexpr int kTokensAtOnce = T::kThreads / T::kChunks;
  const auto* input = static_cast<const std::uint16_t*>(args.input);
  const int own_token = thread / T::kChunks;
  const int tokens_left =
      static_cast<int>(std::min<std::int64_t>(args.m - first_token, T::kTokens)) - own_token;
  int cols_left = static_cast<int>(layout.k) - first_step * T::kStepCols - thread % T::kChunks * 8;
  const std::uint16_t* token_source = input + (first_token + own_token) * args.input_stride +
                                      first_step * T::kStepCols + thread % T::kChunks * 8;
  const auto fetch_tokens = [&](int stage) {
    const std::uint32_t to = shared_address(shared + stage * T::kStageBytes + T::kWeightBytes) +
                             chunk_offset<T>(own_token, thread % T::kChunks);
    const std::uint16_t* source = token_source;
#pragma unroll
    for (int i = 0; i < T::kTokens; i += kTokensAtOnce) {
      if (T::kTokens < kTokensAtOnce && own_token >= T::kTokens) {
        break;
      }
      const bool exists = i < tokens_left && cols_left > 0;
      copy_async(to + i * T::kStepCols * 2, exists ? source : input, exists);
      source += kTokensAtOnce * args.input_stride;
    }
    token_source += T::kStepCols;
    cols_left -= T::kStepCols;
  };
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (!args.weight_is_ready) {
    wait_for_previous_kernels();
  }
#endif
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (i < own_steps) {
      fetch_weight(i);
    }
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  allow_next_kernel();
  wait_for_previous_kernels();
#endif
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) {
    if (i < own_steps) {
      fetch_tokens(i);
    }
    close_async_group();
  }

  // ---- the columns
  float sums[kRowBlocks][kTokenTiles][4] = {};
  float totals[T::kGroups ? kRowBlocks : 1][T::kGroups ? kTokenTiles : 1][4] = {};
  const auto grids_of = [&](int r, std::int64_t group) {
    const std::int64_t row_block = first_row_block + r;
    return T::kElementBytes == 1 && row_block < layout.row_blocks
               ? load_grids<T::kBFloat16>(packed, layout, row_block, group, g)
               : Grids{{1.0F, 1.0F}, {0, 0}};
  };
  Grids grids[kRowBlocks];
#pragma unroll
  for (int r = 0; r < kRowBlocks; ++r) {
    grids[r] = grids_of(r, 0);
  }
  int group = 0;
  const int group_blocks = T::kGroups ? static_cast<int>(layout.group_size / layout.block_cols) : 1;

  int stage = 0;
  for (int done = 0; done < own_steps; ++done) {
    wait_async_groups<T::kStages - 2>();
    __syncthreads();  // the step's stage is there, and that of the step before is free
    if (done + T::kStages - 1 < own_steps) {
      const int free = stage == 0 ? T::kStages - 1 : stage - 1;
      fetch_weight(free);
      fetch_tokens(free);
    }
    close_async_group();
    const std::uint8_t* weights_stage = shared + stage * T::kStageBytes;
    const std::uint32_t tokens_address = shared_address(weights_stage + T::kWeightBytes);
#pragma unroll
    for (int turn = 0; turn < T::kStepBlocks; turn += T::kColWarps) {
      const int i = T::kColWarps == 1 ? turn : turn + col_warp;
      if constexpr (T::kGroups) {
        const int own = ((first_step + done) * T::kStepBlocks + i) / group_blocks;
        if (own != group && own < layout.groups) {
          group = own;
#pragma unroll
          for (int r = 0; r < kRowBlocks; ++r) {
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                totals[r][j][e] += sums[r][j][e] * grids[r].scale[e / 2];
                sums[r][j][e] = 0.0F;
              }
            }
            grids[r] = grids_of(r, group);
          }
        }
      }
      std::uint32_t a[kRowBlocks][3 - T::kElementBytes][4];
#pragma unroll
      for (int r = 0; r < kRowBlocks; ++r) {
        const auto bytes = reinterpret_cast<const uint4*>(
            weights_stage + ((row_warp * kRowBlocks + r) * T::kStepBlocks + i) * kBlockBytes)[lane];
        fragments<T::kBFloat16, T::kElementBytes>(bytes, grids[r].zero, a[r]);
      }
      // A few tiles at a time: between two products for one sum lie those for others.
      constexpr int kBatch = std::min(kTokenTiles, 4);
#pragma unroll
      for (int first = 0; first < kTokenTiles; first += kBatch) {
        // [tile][product][half], four matrices at a time: 32 columns of a tile, or 16 of two.
        std::uint32_t x[kBatch * (3 - T::kElementBytes) / 2][4];
        const int tile = first_tile + first;
#pragma unroll
        for (int j = 0; j < kBatch; j += T::kElementBytes) {
          const int token = (tile + j + (T::kElementBytes == 1 ? 0 : lane / 16)) * 8 + lane % 8;
          const int chunk = T::kElementBytes == 1 ? 4 * i + lane / 8 : 2 * i + lane / 8 % 2;
          load_matrices(tokens_address + chunk_offset<T>(token, chunk), x[j / T::kElementBytes]);
        }
#pragma unroll
        for (int h = 0; h < 3 - T::kElementBytes; ++h) {
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
#pragma unroll
            for (int r = 0; r < kRowBlocks; ++r) {
              const int fragment = j * (3 - T::kElementBytes) + h;
              multiply_accumulate<T::kBFloat16>(sums[r][first + j], a[r][h],
                                                x[fragment / 2][fragment % 2 * 2],
                                                x[fragment / 2][fragment % 2 * 2 + 1]);
            }
          }
        }
      }
    }
    stage = stage == T::kStages - 1 ? 0 : stage + 1;
  }

  // ---- the results, [token, row] in shared memory: of the block, then of the cluster
  wait_async_groups<0>();
  auto* results = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int turn = 0; turn < T::kColWarps; ++turn) {
    __syncthreads();
    if (turn != col_warp) {
      continue;
    }
#pragma unroll
    for (int r = 0; r < kRowBlocks; ++r) {
      const Grids last = T::kGroups ? grids[r] : grids_of(r, 0);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float sum = sums[r][j][e] * last.scale[e / 2];
          if constexpr (T::kGroups) {
            sum += totals[r][j][e];
          }
          const int row = (row_warp * kRowBlocks + r) * kBlockRows + g + e / 2 * 8;
          const int token = (first_tile + j) * 8 + 2 * t + e % 2;
          float& result = results[token * T::kResultStride + row];
          result = turn == 0 ? sum : result + sum;
        }
      }
    }
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  synchronize_cluster();
#else
  __syncthreads();
#endif
  // The blocks of a cluster share the tile's tokens.
  const int last_token = T::kTokens * (part + 1) / split;
  constexpr int kPairs = T::kRows / 2;
  for (int i = T::kTokens * part / split * kPairs + static_cast<int>(threadIdx.x);
       i < last_token * kPairs; i += T::kThreads) {
    const std::int64_t token = first_token + i / kPairs;
    const std::int64_t row = tile_row_block * kBlockRows + i % kPairs * 2;
    if (token >= args.m) {
      break;
    }
    if (row >= layout.n) {
      continue;
    }
    const auto* own =
        reinterpret_cast<const float2*>(results + i / kPairs * T::kResultStride + i % kPairs * 2);
    float pair[2] = {};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    for (int rank = 0; rank < split; ++rank) {
      const float2 theirs = load_from_cluster(own, rank);
#else
    {
      const float2 theirs = *own;
#endif
      pair[0] += theirs.x;
      pair[1] += theirs.y;
    }
    finish_pair<typename T::Element>(
        args, row + 1 < layout.n, pair,
        load_pair_inputs<typename T::Element>(args, layout.n, token, row));
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  synchronize_cluster();  // nobody leaves while others read
#endif
}

/// Blocks of a cluster that share the columns, so that the tiles fill the GPU.
int split_of(std::int64_t tiles, std::int64_t steps, std::int64_t blocks) {
  return static_cast<int>(
      std::clamp<std::int64_t>(std::min(blocks / tiles, steps / kFewestSteps), 1, kMaxSplit));
}

template <typename T>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, int blocks,
            cudaStream_t stream) {
  const auto kernel = tile_kernel<T>;
  MOQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes));
  const std::int64_t row_tiles = pad_to(layout.n, T::kRows) / T::kRows;
  const std::int64_t token_tiles = pad_to(args.m, T::kTokens) / T::kTokens;
  const std::int64_t steps = pad_to(layout.k, T::kStepCols) / T::kStepCols;
  const bool is_hopper = architecture_of(kernel) >= 90;
  const int split =
      is_hopper ? split_of(row_tiles * token_tiles, steps, blocks * device_limits().multiprocessors)
                : 1;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {1, 1, static_cast<unsigned>(split)};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(token_tiles),
                        static_cast<unsigned>(split));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = is_hopper ? 2 : 0;
  launch_kernel(config, kernel, args, layout, static_cast<int>(steps));
}

template <bool kBFloat16, int kElementBytes, bool kGroups>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, const TileChoice& choice,
            cudaStream_t stream) {
  const auto with = [&]<typename A>(A) {
    using Usual = Tile<kBFloat16, kElementBytes, kGroups, A, A::kShared>;
    if constexpr (Usual::kSharedBytes > kLeastSharedBytes) {
      if (!fits_in_shared(Usual::kSharedBytes)) {
        using Small = Tile<kBFloat16, kElementBytes, kGroups, A, kLeastSharedBytes>;
        static_assert(Small::kSharedBytes <= kLeastSharedBytes);
        return launch<Small>(args, layout, choice.blocks, stream);
      }
    }
    launch<Usual>(args, layout, choice.blocks, stream);
  };
  switch (choice.size) {
    case TileSize::k64x32:
      return with(Arrangement<2, 1, 4, 2, 4, 72 << 10>());
    case TileSize::k64x64:
      return with(Arrangement<2, 2, 2, 2, 4, 100 << 10>());
    case TileSize::k128x32:
      return with(Arrangement<4, 1, 2, 2, 4, kTwoBlocks>());
    case TileSize::k128x64:
      return with(Arrangement<4, 1, 2, 2, 8, kTwoBlocks>());
    case TileSize::k128x128:
      return with(Arrangement<4, 2, 1, 2, 8, kTwoBlocks>());
  }
}

template <bool kBFloat16>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, const TileChoice& choice,
            cudaStream_t stream) {
  if (layout.element_bytes == 2) {
    return launch<kBFloat16, 2, false>(args, layout, choice, stream);
  }
  layout.groups == 1 ? launch<kBFloat16, 1, false>(args, layout, choice, stream)
                     : launch<kBFloat16, 1, true>(args, layout, choice, stream);
}

}  // namespace

bool can_tile(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  return suits_tensor_cores(args, layout) && layout.k % 8 == 0 && args.input_stride % 8 == 0 &&
         reinterpret_cast<std::uintptr_t>(args.input) % 16 == 0;
}

TileChoice choose_tile(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  const TileChoice* choice = kTileChoices;
  while (args.m > choice->most_tokens || layout.n * layout.k > choice->most_weights) {
    ++choice;
  }
  return *choice;
}

void tile_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, const TileChoice& choice,
                 cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch<true>(args, layout, choice, stream)
                                 : launch<false>(args, layout, choice, stream);
}

}  // namespace moq::kernels::cuda
