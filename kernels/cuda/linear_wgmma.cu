// Many tokens times a weight by wgmma (compute capability 9.0, sm_90a): the loop over the columns
// is in linear_wgmma_tile.h, what becomes of the sums in linear_wgmma_store.h and
// linear_wgmma_write.h; here is what surrounds them.
//
// One warp of a block fetches, the others multiply and write. Blocks stay on their multiprocessor
// and take one tile after the other, the ring running on between them. Where the tiles are too few,
// small ones split the columns over a cluster, whose blocks add up what they have in each other's
// shared memory, in one order.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/linear_wgmma.h"
#include "kernels/cuda/linear_wgmma_store.h"
#include "kernels/cuda/linear_wgmma_tile.h"
#include "kernels/cuda/linear_wgmma_write.h"

namespace moq::kernels::cuda {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kResultsBarrier = 1;  // number of the first warpgroup's

// Registers of a thread, of the 168 that three warpgroups start with.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;

/// Fetches the columns [first, first + steps) of the tiles of a cluster.
template <typename T>
__device__ __forceinline__ void produce(const WgmmaProducer<T>& producer, const WgmmaWalk& walk,
                                        int first_tile, int first, int steps,
                                        bool weight_is_ready) {
  prefetch_map(producer.maps.tokens);
  const int tiles = walk.row_tiles * walk.token_tiles;
  const int early = weight_is_ready ? min(steps, T::kStages) : 0;
  for (int i = 0; i < early; ++i) {
    producer.fetch_weights(place_of<T>(walk, first_tile, producer.rank), first + i, i);
  }
  wait_for_previous_kernels();
  std::uint32_t place = 0;
  for (int index = first_tile; index < tiles; index += walk.clusters) {
    const WgmmaPlace tile = place_of<T>(walk, index, producer.rank);
    for (int i = 0; i < steps; ++i, ++place) {
      if (place >= early) {
        wait_barrier(producer.ring.empty(place), producer.ring.round(place) ^ 1);
        producer.fetch_weights(tile, first + i, place);
      }
      producer.fetch_tokens(tile, first + i, place);
    }
  }
}

#endif

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    wgmma_kernel(const __grid_constant__ WgmmaMaps maps,
                 const __grid_constant__ DeviceLinearArgs args,
                 const __grid_constant__ DeviceLayout layout,
                 const __grid_constant__ WgmmaWalk walk) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) std::uint8_t shared[];
  // A shuffle tells the compiler that a warp's lanes agree.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int rank = static_cast<int>(cluster_rank());
  const int part = T::kSplits ? rank / walk.sharing : 0;
  const int first_rank = part * walk.sharing;
  const int row_rank = rank - first_rank;
  const int first_step = walk.steps * part / walk.split;
  const int steps = walk.steps * (part + 1) / walk.split - first_step;
  const int first_tile = static_cast<int>(cluster_index());
  const WgmmaRing<T> ring{shared_address(shared)};
  if (threadIdx.x == 0) {
    ring.init(walk.sharing);
  }
  walk.sharing == 1 ? __syncthreads() : meet_cluster();
  allow_next_kernel();

  if (warp >= T::kConsumers * 4) {
    if constexpr (T::kMovesRegisters) {
      shrink_registers<kProducerRegisters>();
    }
    if (threadIdx.x == T::kConsumers * kWarpgroup) {
      const auto ranks = static_cast<std::uint16_t>(((1 << walk.sharing) - 1) << first_rank);
      produce(WgmmaProducer<T>{ring, maps, layout, row_rank, walk.sharing, ranks}, walk, first_tile,
              first_step, steps, args.weight_is_ready);
    }
    __syncwarp();
    if constexpr (T::kSplits) {
      synchronize_cluster();  // as in write_share
    }
  } else {
    if constexpr (T::kMovesRegisters) {
      grow_registers<kConsumerRegisters>();
    }
    const int consumer = warp / 4;
    const int barrier = kResultsBarrier + consumer;
    const int row_block = consumer * 4 + warp % 4;  // of a tile
    auto* results =
        reinterpret_cast<float*>(shared + T::kResultsOffset + consumer * T::kResultBytes);
    wait_for_previous_kernels();
    std::uint32_t place = 0;
    for (int index = first_tile; index < walk.row_tiles * walk.token_tiles;
         index += walk.clusters, place += steps) {
      const WgmmaPlace tile = place_of<T>(walk, index, row_rank);
      const int first_row = tile.row_block * kBlockRows + consumer * kGroupRows;
      float2 scale{1.0F, 1.0F};
      if (T::kElementBytes == 1 && !T::kGroups && tile.row_block + row_block < layout.row_blocks) {
        const auto* scales =
            reinterpret_cast<const float*>(static_cast<const char*>(args.weight.data) +
                                           layout.scales_offset) +
            static_cast<std::int64_t>(tile.row_block + row_block) * kBlockRows +
            threadIdx.x % kWarpSize / 4;
        scale = {scales[0], scales[8]};
      }
      const auto multiply = [&](WgmmaSums<T>& sums) {
        sums.multiply(ring, layout, first_step, first_step + steps, place, row_block, first_rank,
                      walk.sharing);
      };
      WgmmaSums<T> sums;
      if constexpr (T::kSplits) {
        multiply(sums);
        write_share<T>(walk.split, args, layout.n, tile.token, first_row, results, sums, scale,
                       barrier, part, row_rank, walk.sharing);
      } else if (walk.stores) {
        WgmmaStore<T> store(args, layout.n, shared_address(results), barrier, tile.token,
                            first_row);
        multiply(sums);
        store.store(sums, scale);
      } else {
        multiply(sums);
        write_results<T>(args, layout.n, tile.token, first_row, results, sums, scale, barrier);
      }
    }
    __syncwarp();
  }
  meet_cluster();  // nobody leaves while others read, or free a stage
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "compute capability 9.0 is built as 90a"
#endif
}

/// Whether results go to the output as they are, 16 bytes at a time.
bool can_store(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  constexpr std::int64_t kChunk = 8;
  const auto lies_well = [](const void* data, std::int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % kChunk == 0;
  };
  return !args.gated && !args.float32_output && args.qkv.rotary.rotary_dim == 0 &&
         args.qkv.pages.keys == nullptr && layout.n % kChunk == 0 &&
         lies_well(args.output, args.output_stride) &&
         (args.residual == nullptr || lies_well(args.residual, args.residual_stride));
}

template <typename T>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, const WgmmaChoice& choice,
            cudaStream_t stream) {
  const auto kernel = wgmma_kernel<T>;
  MOQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kBlockShared));
  const std::int64_t rows = static_cast<std::int64_t>(T::kRows) * choice.sharing;
  WgmmaWalk walk{.steps = static_cast<int>(pad_to(layout.k, kStepCols) / kStepCols),
                 .row_tiles = static_cast<int>(pad_to(layout.n, rows) / rows),
                 .token_tiles = static_cast<int>(pad_to(args.m, T::kTokens) / T::kTokens),
                 .clusters = 0,
                 .sharing = choice.sharing,
                 .split = 1,
                 .stores = can_store(args, layout)};
  const std::int64_t tiles = static_cast<std::int64_t>(walk.row_tiles) * walk.token_tiles;
  walk.split = T::kSplits ? choice.split : 1;
  while (walk.split > walk.steps) {
    walk.split /= 2;
  }
  const int cluster = walk.sharing * walk.split;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kBlockShared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  // A cluster that splits columns takes one tile: its results lie where its ring was.
  walk.clusters =
      static_cast<int>(T::kSplits ? tiles : std::min(tiles, active_clusters(kernel, config)));
  config.gridDim = dim3(static_cast<unsigned>(walk.clusters * cluster));
  config.numAttrs = kernels_may_overlap() ? 2 : 1;
  const WgmmaMaps maps = wgmma_maps(
      args, layout,
      {.tokens = T::kTokens / walk.sharing, .row_blocks = T::kRowBlocks, .groups = T::kGridGroups});
  MOQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, maps, args, layout, walk));
}

template <bool kBFloat16, int kElementBytes, bool kGroups>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, const WgmmaChoice& choice,
            cudaStream_t stream) {
  const auto with = [&]<typename A>(A) {
    launch<WgmmaTileOf<kBFloat16, kElementBytes, kGroups, A>>(args, layout, choice, stream);
  };
  constexpr int kTokens192 = kGroups ? 160 : 192;  // registers
  switch (choice.tile) {
    case WgmmaTile::k128x256:
      if constexpr (!kGroups) {
        return with(WgmmaArrangement<2, 256, false>());
      }
      [[fallthrough]];
    case WgmmaTile::k128x192:
      return with(WgmmaArrangement<2, kTokens192, false>());
    case WgmmaTile::k128x128:
      return with(WgmmaArrangement<2, 128, false>());
    case WgmmaTile::k64x128:
      if constexpr (!kGroups) {
        return with(WgmmaArrangement<1, 128, false>());
      }
      [[fallthrough]];
    case WgmmaTile::k64x96:
      if constexpr (!kGroups) {
        return with(WgmmaArrangement<1, 96, false>());
      }
      [[fallthrough]];
    case WgmmaTile::k64x64:
      return with(WgmmaArrangement<1, 64, true>());
  }
}

template <bool kBFloat16>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, const WgmmaChoice& choice,
            cudaStream_t stream) {
  if (layout.element_bytes == 2) {
    return launch<kBFloat16, 2, false>(args, layout, choice, stream);
  }
  layout.groups == 1 ? launch<kBFloat16, 1, false>(args, layout, choice, stream)
                     : launch<kBFloat16, 1, true>(args, layout, choice, stream);
}

}  // namespace

bool can_wgmma(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  using Any = WgmmaTileOf<false, 1, false, WgmmaArrangement<1, 64, true>>;
  return suits_tensor_cores(args, layout) && args.norm.kind == NormKind::kNone &&
         args.input_stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(args.input) % 16 == 0 &&
         architecture_of(wgmma_kernel<Any>) == 90;
}

WgmmaChoice choose_wgmma(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  const auto multiprocessors = static_cast<double>(device_limits().multiprocessors);
  const std::int64_t steps = pad_to(layout.k, kStepCols) / kStepCols;
  const WgmmaCost* best = nullptr;
  double best_time = 0.0;
  for (const WgmmaCost& cost : kWgmmaCosts) {
    if (cost.groups != (layout.groups > 1)) {
      continue;
    }
    const auto& [sharing, split] = std::pair(cost.choice.sharing, cost.choice.split);
    const std::int64_t rows = static_cast<std::int64_t>(cost.rows) * sharing;
    const auto blocks = static_cast<double>(pad_to(layout.n, rows) / cost.rows *
                                            (pad_to(args.m, cost.tokens) / cost.tokens) * split);
    const double waves = std::ceil(blocks / (cost.blocks * multiprocessors));
    const double step = blocks > multiprocessors ? cost.step_crowded : cost.step_alone;
    const double time =
        waves * (cost.tile + step * static_cast<double>((steps + split - 1) / split));
    if (best == nullptr || time < best_time) {
      best = &cost;
      best_time = time;
    }
  }
  return best->choice;
}

void wgmma_linear(const DeviceLinearArgs& args, const DeviceLayout& layout,
                  const WgmmaChoice& choice, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch<true>(args, layout, choice, stream)
                                 : launch<false>(args, layout, choice, stream);
}

}  // namespace moq::kernels::cuda
