// Up to eight tokens times a weight, at the speed of reading the weight (compute capability 9.0).
//
// The weight's 16 rows are the M side of mma.m16n8k16 and the tokens its N side, so that one token
// costs what eight do. The warps of a thread block, one on each multiprocessor, share the columns
// of a block of rows; so do the blocks of a cluster where the input is too large for one of them.
// Every warp streams its columns of one block of rows after the other through a ring of bulk
// copies, and keeps the same columns of the input in shared memory, normalised if need be. What the
// warps have summed is added up by the block; the blocks' sums by one of the cluster, while the
// next rows are multiplied.
//
// What matters in a chain of layers is the time from the end of the kernel ahead to this one's end.
// In a model, and where the input is small enough, a block leaves room for another beside it, so
// that the next kernel's blocks fill their rings, and look up what else does not depend on the
// input, while this one works. Behind its end lie only the input's way from the second-level cache,
// the products of what the rings hold, and one exchange of sums. Where a multiprocessor has two
// blocks of one kernel, another has none, and the next kernels' blocks follow them there
// (kApartBytes in linear_stream_plan.h).
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "kernels/common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/linear_products.h"
#include "kernels/cuda/linear_ring.h"
#include "kernels/cuda/linear_stage.h"
#include "kernels/cuda/linear_stream_plan.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarps = kStreamWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlockRowBits = 4;
static_assert(1 << kBlockRowBits == kBlockRows);
constexpr int kSharedAlignment = 128;

/// What a block has in shared memory beside its rings, sums and input.
struct StreamShared {
  std::uint64_t barriers[kWarps][kMaxStages];
  std::uint64_t received[kSlots];
  std::uint64_t taken[kSlots];
  NormShared<kWarps> norm;
};
constexpr int kOtherBytes =  // and CUDA's own
    static_cast<int>(pad_to(sizeof(StreamShared), kSharedAlignment)) + kReservedBytes;
static_assert(2 * (kSharingBytes + kOtherBytes) <= kHopperSharedBytes);
static_assert(kSharingBytes + kApartBytes + 2 * kOtherBytes <= kHopperSharedBytes);
static_assert(2 * (kApartBytes + kOtherBytes) > kHopperSharedBytes);
static_assert(kMaxSharedBytes + kOtherBytes <= kHopperSharedBytes);

/// @tparam kElementBytes  1 for integer weights, 2 for weights of the input's dtype
/// @tparam kGrids         whether a row has several scales, each of whole blocks, or zero points
/// @tparam kInput         what becomes of the input on its way
/// @tparam kSingle        whether m is 1
/// @tparam kClustered     whether plan.split is more than 1
/// (In a chain of small products every instruction counts.)
template <bool kBFloat16, int kElementBytes, bool kGrids, StageKind kInput, bool kSingle,
          bool kClustered>
__global__ void __launch_bounds__(kThreads, 2)
    stream_kernel(const __grid_constant__ DeviceLinearArgs args,
                  const __grid_constant__ DeviceLayout layout,
                  const __grid_constant__ StreamPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Element = typename ElementOf<kBFloat16>::Type;
  constexpr int kBlockCols = kBlockBytes / kBlockRows / kElementBytes;
  constexpr int kSumStep = kSingle ? 2 : 1;  // of a lane's sums every other is of the second token
  extern __shared__ __align__(kSharedAlignment) std::uint8_t shared[];
  __shared__ StreamShared declared;
  auto& [barriers, received, taken, norm_shared] = declared;
  allow_next_kernel();
  touch(args);
  touch(layout);
  touch(plan);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = __shfl_sync(0xffffffffU, thread / kWarpSize, 0);  // (known to be the warp's own)
  const int lane = thread % kWarpSize;
  if (elect_lane()) {  // the lane that will request pieces by them
#pragma unroll
    for (int stage = 0; stage < kMaxStages; ++stage) {
      init_barrier(shared_address(&barriers[warp][stage]));
    }
  }
  const int g = lane / 4;
  const int t = lane % 4;
  const int m = kSingle ? 1 : static_cast<int>(args.m);
  const int rank = kClustered ? static_cast<int>(cluster_rank()) : 0;
  const int cluster = kClustered ? static_cast<int>(cluster_index()) : static_cast<int>(blockIdx.x);

  // ---- this warp's part of the weight, and the ring that brings it
  const int first_rows = cluster * plan.cluster_rows + min(cluster, plan.row_extra);
  const int last_rows = first_rows + plan.cluster_rows + (cluster < plan.row_extra ? 1 : 0);
  const int turns =
      (last_rows - first_rows + plan.turn_rows - 1) >> (plan.turn_bits - kBlockRowBits);
  const auto slice_begin = [&](int of_rank) {
    return part_begin(layout, plan.part_bits, of_rank * kWarps);
  };
  const int part = rank * kWarps + warp;
  const int slice = slice_begin(rank);
  const int first_block = part_begin(layout, plan.part_bits, part);
  const int blocks = part_begin(layout, plan.part_bits, part + 1) - first_block;
  const int longer = first_block - slice - warp * plan.part_blocks;  // parts before this one
  std::uint8_t* stages = shared + plan.stages[1] * (longer * plan.stage_bytes[1] +
                                                    (warp - longer) * plan.stage_bytes[0]);
  Ring<kElementBytes, kGrids> ring(args, layout, plan, first_block, blocks, first_rows, last_rows,
                                   stages, barriers[warp]);

  // ---- the results of a turn: sums of the warps, [block of rows][warp][token][row], and for each
  // block of the cluster some rows of all blocks', [block][token][row]
  auto* partial = reinterpret_cast<float*>(shared + plan.ring_bytes);
  float* inbox = partial + plan.turn_rows * kWarps * m * kPartialStride;
  auto* staged = reinterpret_cast<Element*>(inbox + (kClustered ? kSlots * plan.turn_results : 0));
  const int share_rows = 1 << plan.share_bits;
  const int share = m * share_rows;
  const auto expect_results = [&](int slot) {
    expect_bytes(shared_address(&received[slot]), plan.turn_results * 4);
  };
  if constexpr (kClustered) {
    if (thread == 0) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        init_barrier(shared_address(&received[slot]));
        init_barrier(shared_address(&taken[slot]), plan.split);
        expect_results(slot);
      }
    }
    publish_barriers();
    arrive_at_cluster();
  } else {
    publish_own_barriers();
  }
  if (!args.weight_is_ready) {
    wait_for_previous_kernels();
  }
  ring.begin();

  // ---- what does not depend on kernels ahead. A thread finishes a result of a turn, an even one
  // its neighbour's too.
  const int token = thread >> plan.share_bits;
  int turn_row = rank * share_rows + (thread & (share_rows - 1));
  compute_now(turn_row);
  const bool finishes_pairs = thread < share && thread % 2 == 0;
  const auto* scales =
      reinterpret_cast<const float*>(static_cast<const std::uint8_t*>(args.weight.data) +
                                     layout.scales_offset) +
      first_rows * kBlockRows + turn_row;
  const std::int64_t first_row = static_cast<std::int64_t>(first_rows) * kBlockRows + turn_row;
  const auto row_of = [&](int turn) { return first_row + turn * plan.turn_rows * kBlockRows; };
  const auto exists = [&](int turn) {
    return first_rows + turn * plan.turn_rows + turn_row / kBlockRows < last_rows &&
           row_of(turn) < layout.n;
  };
  float scale = 1.0F;
  PairInputs<Element> inputs;
  const auto load_constants = [&](int turn) {
    if (thread < share && exists(turn)) {
      if (kElementBytes == 1 && !kGrids) {
        scale = scales[turn * plan.turn_rows * kBlockRows];
      }
      if (finishes_pairs) {
        inputs.of_row.load_constants(args, layout.n, row_of(turn));
      }
    }
  };
  const auto load_activations = [&](int turn) {
    if (finishes_pairs && exists(turn)) {
      inputs.of_row.load_activations(args, layout.n, token, row_of(turn), inputs.of_token);
    }
  };
  load_constants(0);
  using Stage = InputStage<kBFloat16, kWarps, kInput, kSingle>;
  Stage stage(args, static_cast<int>(layout.k), slice * kBlockCols,
              (slice_begin(rank + 1) - slice) * kBlockCols, staged, plan.staged_stride);
  if constexpr (Stage::kNormalises) {
    stage.load_norm();
  }
  Products<kBFloat16, kElementBytes> products(
      shared_address(staged + (first_block - slice) * kBlockCols), plan.staged_stride, m, lane);
  std::uint32_t own_sums =
      shared_address(partial + (warp * m + 2 * t) * kPartialStride + g);  // of the warp
  const int sum_row = thread & ((1 << plan.turn_bits) - 1);  // the sum that this thread adds up
  const int sum_token = thread >> plan.turn_bits;
  std::uint32_t all_sums =
      shared_address(partial + (sum_row / kBlockRows * kWarps * m + sum_token) * kPartialStride +
                     sum_row % kBlockRows);
  compute_now(own_sums);
  compute_now(all_sums);
  ring.fill_early();

  // What a turn computes alike each time stands in front of the loop: in front of the wait.
#pragma unroll 1
  for (int turn = 0; turn < turns + (kClustered ? 1 : 0); ++turn) {
    if (turn == 0) {
      wait_for_previous_kernels();
      stage.copy();
      if (finishes_pairs) {
        inputs.of_token = load_token_inputs(args, token);
        load_activations(0);
      }
      wait_async_groups<0>();
      if constexpr (kClustered) {
        wait_for_cluster();  // the barriers of all blocks have been made
      }
      if constexpr (Stage::kNormalises) {
        stage.normalise(plan.split, norm_shared);
      }
      __syncthreads();
    }
    const int finished = kClustered ? turn - 1 : turn;  // the turn whose results are finished here
    if (finished > 0) {
      load_constants(finished);
      load_activations(finished);
    }
    float sum = 0.0F;
    if (turn < turns) {
      const int rows = min(plan.turn_rows, last_rows - first_rows - turn * plan.turn_rows);
#pragma unroll 1
      for (int r = 0; r < rows; ++r) {
        float totals[4] = {};  // of finished groups, scaled
        products.clear();
        Grids grids;
        const auto add_scaled = [&] {
#pragma unroll
          for (int e = 0; e < 4; e += kSumStep) {
            totals[e] =
                fmaf(products.sums[0][e] + products.sums[1][e], grids.scale[e / 2], totals[e]);
          }
          products.clear();
        };
        int next_group = ring.group_end(0);
#pragma unroll 1
        for (int first = 0; first < blocks; first += ring.piece()) {
          const int count = min(ring.piece(), blocks - first);
          const std::uint32_t held = ring.wait();
          grids = ring.template grids<kBFloat16>(held, 0, g);
          if constexpr (!kGrids) {
            products.add(held, 0, count, first, grids.zero);
          } else {
            int group = 0;  // of the piece's
            for (int j = 0; j < count;) {
              const int end = min(count, next_group - first);
              products.add(held, j, end, first, grids.zero);
              j = end;
              if (first + j == next_group) {
                add_scaled();
                next_group += ring.group_blocks();
                if (j < count) {
                  grids = ring.template grids<kBFloat16>(held, ++group, g);
                }
              }
            }
          }
          ring.release();
        }
        if (blocks > 0) {
          add_scaled();
        }
        if (r == 0 && turn > 0) {
          __syncthreads();  // the sums of the turn before have been read
        }
        const std::uint32_t own = own_sums + r * kWarps * m * kPartialStride * 4;
#pragma unroll
        for (int e = 0; e < 4; e += kSumStep) {
          if (2 * t + e % 2 < m) {
            store_shared(own + (e % 2 * kPartialStride + e / 2 * 8) * 4, totals[e]);
          }
        }
      }
      __syncthreads();
      float quarters[4] = {};
      if (thread < plan.turn_results) {
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
          quarters[i % 4] += load_shared(all_sums + i * m * kPartialStride * 4);
        }
      }
      sum = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]);
      if constexpr (kClustered) {
        // A slot is used again when all blocks of the cluster have taken what was in it. They are
        // told only of slots that they will use again: nobody is told anything after his end.
        const int slot = turn % kSlots;
        if (turn >= 2 && turn + 2 < turns && thread < plan.split) {
          arrive_in_cluster(shared_address(&taken[(turn - 2) % kSlots]), thread);
        }
        if (turn >= kSlots) {
          wait_barrier(shared_address(&taken[slot]), (turn / kSlots - 1) % 2);
        }
        if (thread < plan.turn_results) {
          send_to_cluster(
              shared_address(&inbox[slot * plan.turn_results + rank * share +
                                    (sum_token << plan.share_bits) + (sum_row & (share_rows - 1))]),
              sum, shared_address(&received[slot]), sum_row >> plan.share_bits);
        }
      }
    }
    if (finished < 0) {
      continue;
    }
    if constexpr (kClustered) {
      const int slot = finished % kSlots;
      wait_barrier(shared_address(&received[slot]), finished / kSlots % 2);
      if (thread == 0) {
        expect_results(slot);
      }
      sum = 0.0F;
      for (int i = 0; i < plan.split && thread < share; ++i) {
        sum += inbox[slot * plan.turn_results + i * share + thread];
      }
    }
    sum *= scale;
    const float next = __shfl_down_sync(0xffffffffU, sum, 1);  // of the row behind this one
    if (finishes_pairs && exists(finished)) {
      finish_pair<Element>(args, row_of(finished) + 1 < layout.n, {sum, next}, inputs);
    }
  }
  if constexpr (kClustered && Stage::kNormalises) {
    wait_for_cluster();  // nobody leaves while others read its sums
  }
#endif
}

template <typename Kernel>
void allow_shared_memory(Kernel* kernel) {
  MOQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes));
  // Blocks of several kernels share a multiprocessor only if it was given enough shared memory when
  // the first of them started.
  MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
}

/// How blocks get the input, alone or in clusters.
StageKind stage_kind(const DeviceLinearArgs& args, const DeviceLayout& layout, bool clustered) {
  const bool keeps = args.m == 1 && !clustered && layout.k % kChunk == 0 &&
                     layout.k <= kChunk * kThreads && suits_vectors(args.input);
  return args.norm.kind == NormKind::kNone ? StageKind::kCopied
         : keeps                           ? StageKind::kKept
                                           : StageKind::kNormalised;
}

template <bool kBFloat16, int kElementBytes, bool kGrids>
auto* kernel_for(const DeviceLinearArgs& args, const DeviceLayout& layout, bool clustered) {
  const auto of = [&]<bool kSingle, bool kClustered>() {
    const auto with = [](auto kind) {
      return stream_kernel<kBFloat16, kElementBytes, kGrids, kind(), kSingle, kClustered>;
    };
    const StageKind kind = stage_kind(args, layout, kClustered);
    if constexpr (kSingle && !kClustered) {
      if (kind == StageKind::kKept) {
        return with(std::integral_constant<StageKind, StageKind::kKept>());
      }
    }
    return kind == StageKind::kCopied
               ? with(std::integral_constant<StageKind, StageKind::kCopied>())
               : with(std::integral_constant<StageKind, StageKind::kNormalised>());
  };
  if (args.m == 1) {
    return clustered ? of.template operator()<true, true>() : of.template operator()<true, false>();
  }
  return clustered ? of.template operator()<false, true>() : of.template operator()<false, false>();
}

template <bool kBFloat16, int kElementBytes, bool kGrids>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  const int split = stream_split(layout, static_cast<int>(args.m));
  auto* kernel = kernel_for<kBFloat16, kElementBytes, kGrids>(args, layout, split > 1);
  allow_shared_memory(kernel);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(split), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(split));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kMaxSharedBytes;  // one block on a multiprocessor
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = kernels_may_overlap() ? 2 : 1;
  const std::int64_t clusters =
      split == 1 ? device_limits().multiprocessors : required_clusters(kernel, config);
  const StreamPlan plan =
      stream_plan(layout, static_cast<int>(args.m), clusters, leaves_room(args, layout));
  config.gridDim = dim3(static_cast<unsigned>(plan.clusters * split));
  const bool keeps_apart = args.spread && layout.n * layout.k >= kManyWeights;
  config.dynamicSmemBytes =
      static_cast<std::size_t>(std::max(plan.shared_bytes, keeps_apart ? kApartBytes : 0));
  launch_kernel(config, kernel, args, layout, plan);
}

template <bool kBFloat16>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  if (layout.element_bytes == 2) {
    return launch<kBFloat16, 2, false>(args, layout, stream);
  }
  layout.groups == 1 && !layout.asymmetric ? launch<kBFloat16, 1, false>(args, layout, stream)
                                           : launch<kBFloat16, 1, true>(args, layout, stream);
}

}  // namespace

bool can_stream(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  return args.m <= kStreamTokens && suits_tensor_cores(args, layout) &&
         stream_split(layout, static_cast<int>(args.m)) <= kMaxSplit &&
         architecture_of(stream_kernel<false, 1, false, StageKind::kCopied, false, false>) >= 90 &&
         device_limits().shared_bytes_per_multiprocessor >= kMaxSharedBytes + kOtherBytes;
}

bool streams_in_clusters(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  return stream_split(layout, static_cast<int>(args.m)) > 1;
}

void stream_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch<true>(args, layout, stream)
                                 : launch<false>(args, layout, stream);
}

}  // namespace moq::kernels::cuda
