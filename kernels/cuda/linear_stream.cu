// Up to sixteen tokens times a weight, at the speed of reading the weight (compute capability 9.0).
//
// The weight's 16 rows are the M side of mma.m16n8k16 and the tokens its N side, so that one token
// costs what eight do. The columns are split over a cluster of thread blocks, each of which keeps
// its part of the input in shared memory, and over the warps of a block. Every warp streams its
// columns of one block of rows after the other, with their scales, through a ring of bulk copies.
// What the warps have summed is added up by the block, and the blocks' sums by one of the cluster
// while the next rows are multiplied. Several blocks fit on a multiprocessor, also those of the
// next kernel, which fill their rings before this one has ended: the weights of a chain of layers
// are read with little pause.
#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>

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
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kPieceBlocks = 4;  // that a stage of a ring holds at most: 2 KB
constexpr int kMaxStages = 8;
constexpr int kSlots = 4;                   // of sums that a block holds for its cluster
constexpr int kMaxSplit = 8;                // blocks of a cluster
constexpr int kGridBytes = kBlockRows * 4;  // scales, or zero points, of a block of rows
constexpr int kMaxSliceBytes = 128 << 10;   // of the input, in a block
constexpr int kMaxSharedBytes = 200 << 10;  // that a launch chooses

/// How the columns and rows of a weight are shared. Plain data, passed to the kernel by value.
struct Plan {
  int split;         ///< blocks of a cluster; a power of two, as are the next two
  int col_warps;     ///< warps of a block that share the columns of a block of rows
  int share_rows;    ///< rows of a turn that a block of the cluster finishes, a thread each result
  int part_bits;     ///< of split * col_warps, the parts of the columns
  int cluster_rows;  ///< blocks of rows of a cluster; the first row_extra clusters have one more
  int row_extra;
  int piece_blocks;  ///< that a stage of a warp's ring holds
  int piece_grids;   ///< scales (and zero points) of a block of rows that come with them
  int stages;
  int stage_bytes;
  int staged_stride;  ///< elements from one token to the next in shared memory
};

/// Columns [first, first + cols) of every token in shared memory, zeros behind their ends. The
/// copies may still be under way.
template <typename Bits>
__device__ void stage_input(const DeviceLinearArgs& args, int k, int first, int cols, int stride,
                            Bits* staged) {
  const auto* input = static_cast<const Bits*>(args.input);
  const bool whole =
      (k | args.input_stride) % 8 == 0 && reinterpret_cast<std::uintptr_t>(input) % 16 == 0;
  const int step = whole ? 8 : 1;
  for (int token = static_cast<int>(threadIdx.x) / kWarpSize; token < args.m; token += kWarps) {
    const Bits* source = input + token * args.input_stride + first;
    Bits* target = staged + token * stride;
    for (int col = static_cast<int>(threadIdx.x) % kWarpSize * step; col < cols;
         col += kWarpSize * step) {
      const bool exists = first + col < k;
      if (whole) {
        copy_async(shared_address(target + col), exists ? source + col : input, exists);
      } else {
        target[col] = exists ? source[col] : Bits{0};
      }
    }
  }
  close_async_group();
}

/// kElementBytes is 1 for integer weights and 2 for weights of the input's dtype; kGroups: a row
/// has several scales, each of whole blocks; kTiles: of eight tokens.
template <bool kBFloat16, int kElementBytes, bool kGroups, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 && !kGroups ? 4 : 3)
    stream_kernel(DeviceLinearArgs args, DeviceLayout layout, Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kBlockCols = kBlockBytes / kBlockRows / kElementBytes;
  constexpr int kTokens = 8 * kTiles;
  extern __shared__ __align__(128) std::uint8_t shared[];
  __shared__ std::uint64_t barriers[kWarps][kMaxStages];
  __shared__ std::uint64_t received[kSlots];
  __shared__ std::uint64_t taken[kSlots];
  __shared__ float partial[2][kWarps][kBlockRows][kTokens + 1];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int m = static_cast<int>(args.m);
  const int rank = static_cast<int>(cluster_rank());
  const int cluster = static_cast<int>(cluster_index());

  // ---- this warp's part of the weight, and the ring that brings it
  const int turn_rows = kWarps / plan.col_warps;  // blocks of rows that the block takes at once
  const int first_rows = cluster * plan.cluster_rows + min(cluster, plan.row_extra);
  const int last_rows = first_rows + plan.cluster_rows + (cluster < plan.row_extra ? 1 : 0);
  const int own_rows = first_rows + warp / plan.col_warps;
  const int part = rank * plan.col_warps + warp % plan.col_warps;
  const auto part_begin = [&](int i) {
    return static_cast<int>(i * layout.col_blocks >> plan.part_bits);
  };
  const int slice = part_begin(rank * plan.col_warps);
  const int slice_blocks = part_begin((rank + 1) * plan.col_warps) - slice;
  const int first_block = part_begin(part);
  const int blocks = part_begin(part + 1) - first_block;

  std::uint8_t* ring = shared + warp * plan.stages * plan.stage_bytes;
  const auto* weight = static_cast<const std::uint8_t*>(args.weight.data);
  const int group_blocks = kGroups ? static_cast<int>(layout.group_size / layout.block_cols) : 1;
  const auto group_of = [&](int block) {
    return kGroups ? (first_block + block) / group_blocks : 0;
  };
  int filled_rows = blocks == 0 ? last_rows : own_rows;
  int filled = 0;  // blocks of those rows
  const std::uint8_t* source = weight + (own_rows * layout.col_blocks + first_block) * kBlockBytes;
  const auto fill = [&](int stage) {
    if (lane != 0 || filled_rows >= last_rows) {
      return;
    }
    const int count = min(plan.piece_blocks, blocks - filled);
    const std::uint32_t barrier = shared_address(&barriers[warp][stage]);
    const std::uint32_t target = shared_address(ring + stage * plan.stage_bytes);
    if constexpr (kElementBytes == 1) {
      const int group = group_of(filled);
      const int grid_bytes = (group_of(filled + count - 1) - group + 1) * kGridBytes;
      const std::int64_t grid = (filled_rows * layout.groups + group) * kGridBytes;
      const std::uint32_t grids = target + plan.piece_blocks * kBlockBytes;
      expect_bytes(barrier, count * kBlockBytes + grid_bytes * (layout.asymmetric ? 2 : 1));
      bulk_copy(grids, weight + layout.scales_offset + grid, grid_bytes, barrier);
      if (layout.asymmetric) {
        bulk_copy(grids + plan.piece_grids * kGridBytes, weight + layout.zero_points_offset + grid,
                  grid_bytes, barrier);
      }
    } else {
      expect_bytes(barrier, count * kBlockBytes);
    }
    bulk_copy(target, source, count * kBlockBytes, barrier);
    source += count * kBlockBytes;
    filled += count;
    if (filled == blocks) {
      filled = 0;
      filled_rows += turn_rows;
      source += (turn_rows * layout.col_blocks - blocks) * kBlockBytes;
    }
  };
  const auto read_grids = [&](const std::uint8_t* stage, int i) {
    Grids grids{{1.0F, 1.0F}, {0, 0}};
    if constexpr (kElementBytes == 1) {
      const float* scales =
          reinterpret_cast<const float*>(stage + plan.piece_blocks * kBlockBytes) + i * kBlockRows;
      const float* zero_points = scales + plan.piece_grids * kBlockRows;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        grids.scale[half] = scales[g + 8 * half];
        grids.zero[half] =
            zero_pair<kBFloat16>(layout.asymmetric ? zero_points[g + 8 * half] : 0.0F);
      }
    }
    return grids;
  };

  // ---- the results of a turn, [token][row]. Each block of the cluster finishes some of the rows:
  // it receives the sums of all.
  const int rows = turn_rows * kBlockRows;
  const int share = m * plan.share_rows;
  const int share_bits = __ffs(plan.share_rows) - 1;
  auto* inbox = reinterpret_cast<float*>(shared + kWarps * plan.stages * plan.stage_bytes);
  const auto expect_results = [&](int slot) {
    expect_bytes(shared_address(&received[slot]), plan.split * share * 4);
  };

  if (lane == 0) {
    for (std::uint64_t& barrier : barriers[warp]) {
      init_barrier(shared_address(&barrier));
    }
    if (warp == 0) {
      for (int slot = 0; slot < kSlots; ++slot) {
        init_barrier(shared_address(&received[slot]));
        init_barrier(shared_address(&taken[slot]), plan.split);
        expect_results(slot);
      }
    }
    publish_barriers();
  }
  meet_cluster();
  if (!args.weight_is_ready) {
    wait_for_previous_kernels();
  }
  for (int stage = 0; stage < plan.stages; ++stage) {
    fill(stage);
  }
  allow_next_kernel();
  wait_for_previous_kernels();

  auto* staged = reinterpret_cast<std::uint16_t*>(inbox + pad_to(kSlots * plan.split * share, 4));
  stage_input(args, static_cast<int>(layout.k), slice * kBlockCols, slice_blocks * kBlockCols,
              plan.staged_stride, staged);
  wait_async_groups<0>();
  __syncthreads();
  // Addresses of the matrices that this lane gives, [tile] or, of two-byte elements, one for all:
  // 32 columns of a tile, or 16 of every tile. A column of B that is no token may hold anything:
  // its results are not read.
  std::uint32_t input[kElementBytes == 1 ? kTiles : 1];
#pragma unroll
  for (int i = 0; i < static_cast<int>(std::size(input)); ++i) {
    const int token = 8 * i + (kElementBytes == 1 ? 0 : lane / 16 * 8) + lane % 8;
    const int chunk = kElementBytes == 1 ? lane / 8 : lane / 8 % 2;
    input[i] = shared_address(staged + (token < m ? token : 0) * plan.staged_stride + chunk * 8 +
                              (first_block - slice) * kBlockCols);
  }

  int stage = 0;
  std::uint32_t parity = 0;
  const int turns = (last_rows - first_rows + turn_rows - 1) / turn_rows;
  for (int turn = 0; turn <= turns; ++turn) {
    if (turn < turns) {
      float totals[kTiles][4] = {};   // of finished groups, scaled
      float sums[2][kTiles][4] = {};  // two chains of products
      for (int first = own_rows + turn * turn_rows < last_rows ? 0 : blocks; first < blocks;
           first += plan.piece_blocks) {
        const int count = min(plan.piece_blocks, blocks - first);
        const std::uint8_t* held = ring + stage * plan.stage_bytes;
        wait_barrier(shared_address(&barriers[warp][stage]), parity);
        Grids grids = read_grids(held, 0);
        const auto add_scaled = [&] {
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              totals[i][e] = fmaf(sums[0][i][e] + sums[1][i][e], grids.scale[e / 2], totals[i][e]);
              sums[0][i][e] = sums[1][i][e] = 0.0F;
            }
          }
        };
        const auto multiply = [&](int j, int chain) {
          const auto bytes = reinterpret_cast<const uint4*>(held + j * kBlockBytes)[lane];
          std::uint32_t a[3 - kElementBytes][4];
          fragments<kBFloat16, kElementBytes>(bytes, grids.zero, a);
          const int offset = (first + j) * kBlockCols * 2;
          if constexpr (kElementBytes == 1) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              std::uint32_t x[4];
              load_matrices(input[i] + offset, x);
              multiply_accumulate<kBFloat16>(sums[0][i], a[0], x[0], x[1]);
              multiply_accumulate<kBFloat16>(sums[1][i], a[1], x[2], x[3]);
            }
          } else {
            std::uint32_t x[2 * kTiles];
            load_matrices(input[0] + offset, x);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              multiply_accumulate<kBFloat16>(sums[chain][i], a[0], x[2 * i], x[2 * i + 1]);
            }
          }
        };
        if (!kGroups && count == kPieceBlocks) {
#pragma unroll
          for (int j = 0; j < kPieceBlocks; ++j) {
            multiply(j, j % 2);
          }
        } else {
          int group = 0;  // of the piece's
          int next_group = kGroups ? (group_of(first) + 1) * group_blocks - first_block : 0;
#pragma unroll 1
          for (int j = 0; j < count; ++j) {
            if (kGroups && first + j == next_group) {
              add_scaled();
              grids = read_grids(held, ++group);
              next_group += group_blocks;
            }
            multiply(j, 0);
          }
        }
        add_scaled();
        __syncwarp();
        fill(stage);
        if (++stage == plan.stages) {
          stage = 0;
          parity ^= 1U;
        }
      }
      float(&own)[kBlockRows][kTokens + 1] = partial[turn % 2][warp];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          own[g + e / 2 * 8][8 * i + 2 * t + e % 2] = totals[i][e];
        }
      }
      // (The barrier also keeps the other half of `partial` from being written while it is read.)
      __syncthreads();
      // A slot is used again when all blocks of the cluster have taken what was in it. They are
      // told only of slots that they will use again: nobody is told anything after his end.
      const int slot = turn % kSlots;
      if (turn >= 2 && turn + 2 < turns && thread < plan.split) {
        arrive_in_cluster(shared_address(&taken[(turn - 2) % kSlots]), thread);
      }
      if (turn >= kSlots) {
        wait_barrier(shared_address(&taken[slot]), (turn / kSlots - 1) % 2);
      }
      for (int i = thread; i < m * rows; i += kThreads) {
        const int row = i & (rows - 1);
        const int token = i / kBlockRows / turn_rows;
        float sum = 0.0F;
        for (int c = 0; c < plan.col_warps; ++c) {
          sum += partial[turn % 2][row / kBlockRows * plan.col_warps + c][row % kBlockRows][token];
        }
        send_to_cluster(
            shared_address(&inbox[(slot * plan.split + rank) * share + (token << share_bits) +
                                  (row & (plan.share_rows - 1))]),
            sum, shared_address(&received[slot]), row >> share_bits);
      }
    }
    if (turn > 0) {
      const int slot = (turn - 1) % kSlots;
      wait_barrier(shared_address(&received[slot]), (turn - 1) / kSlots % 2);
      if (thread == 0) {
        expect_results(slot);
      }
      const int row_in_turn = rank * plan.share_rows + (thread & (plan.share_rows - 1));
      const int row_block = first_rows + (turn - 1) * turn_rows + row_in_turn / kBlockRows;
      const std::int64_t row =
          static_cast<std::int64_t>(row_block) * kBlockRows + row_in_turn % kBlockRows;
      float sum = 0.0F;
      for (int i = 0; i < plan.split && thread < share; ++i) {
        sum += inbox[(slot * plan.split + i) * share + thread];
      }
      const float next = __shfl_down_sync(0xffffffffU, sum, 1);  // of the row behind this one
      if (thread < share && thread % 2 == 0 && row_block < last_rows && row < layout.n) {
        using Element = typename ElementOf<kBFloat16>::Type;
        const int token = thread >> share_bits;
        finish_pair<Element>(args, layout.n, token, row, {sum, next},
                             load_pair_inputs<Element>(args, layout.n, token, row));
      }
    }
  }
#endif
}

/// Elements from one token to the next in shared memory: the same 16 bytes of eight tokens, which
/// are loaded at once, then meet all banks.
int staged_stride(const DeviceLayout& layout, int split) {
  const std::int64_t cols = pad_to(layout.col_blocks, split) / split * layout.block_cols;
  return static_cast<int>(pad_to(cols, 64)) + 8;
}

/// Tokens that a kernel is compiled for: what depends on this and not on m is alike for all m up to
/// 8, and so are the sums.
constexpr int compiled_tokens(std::int64_t m) {
  return m <= 8 ? 8 : 16;
}

/// All but the rows of a cluster. The figures were chosen by measuring, as those of
/// linear_choice.h.
Plan plan_of(const DeviceLayout& layout, int tokens) {
  const bool few = tokens == 8;
  Plan plan{};
  plan.split = few ? 2 : 4;
  while (plan.split < kMaxSplit && tokens * staged_stride(layout, plan.split) * 2 >
                                       (few ? kMaxSliceBytes : kMaxSliceBytes / 2)) {
    plan.split *= 2;
  }
  plan.col_warps = few || plan.split == kMaxSplit ? 4 : 2;
  plan.share_rows = kWarps / plan.col_warps * kBlockRows / plan.split;
  while (1 << plan.part_bits < plan.split * plan.col_warps) {
    ++plan.part_bits;
  }
  const auto most_blocks =
      static_cast<int>(pad_to(layout.col_blocks, 1 << plan.part_bits) >> plan.part_bits);
  const int kinds = layout.element_bytes == 2 ? 0 : layout.asymmetric ? 2 : 1;
  const bool groups = layout.groups > 1;
  const int fixed_bytes = groups ? 0 : kinds * kGridBytes;
  const int block_bytes = kBlockBytes + (groups ? kinds * kGridBytes : 0);
  const int ring_bytes =
      (few && most_blocks >= 16 ? 3 : 2) * (kPieceBlocks * kBlockBytes + 2 * kGridBytes);
  plan.piece_blocks =
      std::min({kPieceBlocks, most_blocks, (ring_bytes / 2 - fixed_bytes) / block_bytes});
  plan.piece_grids = groups ? plan.piece_blocks : 1;
  plan.stage_bytes = plan.piece_blocks * block_bytes + fixed_bytes;
  plan.stages = std::min(kMaxStages, ring_bytes / plan.stage_bytes);
  plan.staged_stride = staged_stride(layout, plan.split);
  return plan;
}

template <bool kBFloat16, int kElementBytes, bool kGroups, int kTiles>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  const auto kernel = stream_kernel<kBFloat16, kElementBytes, kGroups, kTiles>;
  Plan plan = plan_of(layout, 8 * kTiles);
  MOQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(plan.split), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.split));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes =
      static_cast<std::size_t>(kWarps * plan.stages * plan.stage_bytes +
                               pad_to(kSlots * plan.split * args.m * plan.share_rows, 4) * 4 +
                               args.m * plan.staged_stride * 2);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  // One turn, if three blocks a multiprocessor suffice for it, on all multiprocessors; else as many
  // clusters as run at once, up to four blocks a multiprocessor.
  const auto clusters_of = [&](std::int64_t blocks) {
    return blocks * device_limits().multiprocessors / plan.split;
  };
  const std::int64_t turn_rows = kWarps / plan.col_warps;
  const std::int64_t one_turn = (layout.row_blocks + turn_rows - 1) / turn_rows;
  const std::int64_t clusters = std::min(
      one_turn <= clusters_of(3) ? std::max(one_turn, std::min(layout.row_blocks, clusters_of(1)))
                                 : clusters_of(4),
      active_clusters(kernel, config));
  plan.cluster_rows = static_cast<int>(layout.row_blocks / clusters);
  plan.row_extra = static_cast<int>(layout.row_blocks % clusters);
  config.gridDim = dim3(static_cast<unsigned>(clusters * plan.split));
  MOQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args, layout, plan));
}

template <bool kBFloat16, int kElementBytes, bool kGroups>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  compiled_tokens(args.m) == 8 ? launch<kBFloat16, kElementBytes, kGroups, 1>(args, layout, stream)
                               : launch<kBFloat16, kElementBytes, kGroups, 2>(args, layout, stream);
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
  return args.m <= kStreamTokens && suits_tensor_cores(args, layout) &&
         compiled_tokens(args.m) * staged_stride(layout, kMaxSplit) * 2 <= kMaxSliceBytes &&
         architecture_of(stream_kernel<false, 1, false, 1>) >= 90;
}

void stream_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch<true>(args, layout, stream)
                                 : launch<false>(args, layout, stream);
}

}  // namespace moq::kernels::cuda
