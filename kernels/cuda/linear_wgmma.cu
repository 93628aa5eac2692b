// Many tokens times a weight by wgmma (compute capability 9.0, sm_90a): the ring that feeds it is
// in linear_wgmma_tile.h, the loop over the columns in linear_wgmma_sums.h, what becomes of the
// sums in linear_wgmma_store.h, linear_wgmma_write.h and linear_wgmma_share.h; here is what
// surrounds them.
//
// One warp of a block fetches, the others multiply and write. Blocks stay on their multiprocessor
// and take one tile after the other, the ring running on between them. Where the tiles are too few,
// blocks take one each and split the columns over a cluster, in which they send each other what
// they have.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/linear_wgmma.h"
#include "kernels/cuda/linear_wgmma_share.h"
#include "kernels/cuda/linear_wgmma_store.h"
#include "kernels/cuda/linear_wgmma_sums.h"
#include "kernels/cuda/linear_wgmma_tile.h"
#include "kernels/cuda/linear_wgmma_write.h"

namespace moq::kernels::cuda {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kResultsBarrier = 1;  // number of the first warpgroup's

// Registers of a thread, of the 168 that three warpgroups start with, or the 128 of four.
constexpr int kProducerRegisters = 24;
template <int kConsumers>
constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;

/// Fetches the columns [first, first + steps) of the tiles of a cluster.
template <typename T>
__device__ __forceinline__ void produce(const WgmmaProducer<T>& producer, const WgmmaWalk& walk,
                                        int first_tile, int first, int steps,
                                        bool weight_is_ready) {
  prefetch_map(producer.maps.tokens);
  const int tiles = walk.row_tiles * walk.token_tiles;
  const int early = weight_is_ready ? min(steps, T::kStages) : 0;
  for (int i = 0; i < early; ++i) {
    producer.fetch_weights(place_of<T>(walk, first_tile), first + i, i, /*first=*/true);
  }
  bring(walk.next);
  wait_for_previous_kernels();
  WgmmaSlot<T> slot;
  int fetched = 0;
  for (int index = first_tile; index < tiles; index += walk.clusters) {
    const WgmmaPlace tile = place_of<T>(walk, index);
    for (int i = 0; i < steps; ++i, ++fetched, slot.advance()) {
      if (fetched >= early) {
        wait_barrier(producer.ring.empty(slot.stage), slot.parity ^ 1);
        producer.fetch_weights(tile, first + i, slot.stage, fetched < T::kStages);
      }
      producer.fetch_tokens(tile, first + i, slot.stage);
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
  const int part = T::kSplits ? static_cast<int>(cluster_rank()) : 0;
  const int first_step = walk.steps * part / walk.split;
  const int steps = walk.steps * (part + 1) / walk.split - first_step;
  const int first_tile = static_cast<int>(cluster_index());
  const WgmmaRing<T> ring{shared_address(shared)};
  if (threadIdx.x == 0) {
    ring.init();
    ring.expect_shares(walk.split);
  }
  __syncthreads();
  if constexpr (T::kSplits) {
    arrive_at_cluster();  // write_share waits
  }
  allow_next_kernel();

  if (warp >= T::kConsumers * 4) {
    if constexpr (T::kMovesRegisters) {
      shrink_registers<kProducerRegisters>();
    }
    if (threadIdx.x == T::kConsumers * kWarpgroup) {
      produce(WgmmaProducer<T>{ring, maps, layout, walk.token_bytes}, walk, first_tile, first_step,
              steps, args.weight_is_ready);
    }
    __syncwarp();
    if constexpr (T::kSplits) {
      wait_for_cluster();  // as in write_share
    }
  } else {
    if constexpr (T::kMovesRegisters) {
      grow_registers<kConsumerRegisters<T::kConsumers>>();
    }
    const int consumer = warp / 4;
    const int barrier = kResultsBarrier + consumer;
    const int row_block = consumer * 4 + warp % 4;  // of a tile
    auto* results =
        reinterpret_cast<float*>(shared + T::kResultsOffset + consumer * T::kResultBytes);
    if (!T::kFirstApart || !args.weight_is_ready) {
      wait_for_previous_kernels();  // (else only constants are read until multiply() has)
    }
    WgmmaSlot<T> slot;
    for (int index = first_tile; index < walk.row_tiles * walk.token_tiles;
         index += walk.clusters) {
      const WgmmaPlace tile = place_of<T>(walk, index);
      const int first_row = tile.row_block * kBlockRows + consumer * kGroupRows;
      Grids grids{{1.0F, 1.0F}, {}};
      if (T::kElementBytes == 1 && !T::kGroups && tile.row_block + row_block < layout.row_blocks) {
        grids = load_grids<T::kBFloat16>(args.weight.data, layout, tile.row_block + row_block, 0,
                                         static_cast<int>(threadIdx.x) % kWarpSize / 4);
      }
      const float2 scale{grids.scale[0], grids.scale[1]};
      std::conditional_t<T::kGroups, WgmmaGroupSums<T>, WgmmaSums<T>> sums;
      // load() reads what kernels ahead have written.
      const auto multiply = [&](const auto& load) {
        if constexpr (T::kGroups) {
          load();
          sums.multiply(ring, slot, first_step, steps, row_block, layout);
        } else {
          sums.begin(ring, slot, row_block, grids.zero);
          if constexpr (T::kFirstApart) {
            wait_for_previous_kernels();
          }
          load();
          sums.multiply(ring, slot, steps, row_block, grids.zero);
        }
      };
      if constexpr (T::kSplits) {
        const int share = T::share(walk.split);
        WgmmaShareWriter<T> writer(args, layout.n, tile.token + part * share, first_row);
        multiply([&] {
          if (part < T::kMostShares) {
            writer.load(0, share);
          }
        });
        write_share<T>(walk.split, writer, results, sums, scale, barrier, ring.received(consumer),
                       part);
      } else if (walk.stores) {
        WgmmaStore<T> store(args, layout.n, shared_address(results), barrier, tile.token,
                            first_row);
        multiply([] {});
        store.store(sums, scale);
      } else {
        multiply([] {});
        write_results<T>(args, layout.n, tile.token, first_row, results, sums, scale, barrier);
      }
    }
    __syncwarp();
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "compute capability 9.0 is built as 90a"
#endif
}

/// Whether results go to the output or to the cache as they are, 16 bytes at a time.
bool can_store(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  constexpr std::int64_t kChunk = 8;
  const auto aligned = [](const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  };
  const DeviceQkvOutput& qkv = args.qkv;
  return !args.gated && !args.float32_output && qkv.rotary.rotary_dim == 0 &&
         layout.n % kChunk == 0 && aligned(args.output) && args.output_stride % kChunk == 0 &&
         (args.residual == nullptr ||
          (aligned(args.residual) && args.residual_stride % kChunk == 0)) &&
         (qkv.pages.keys == nullptr ||
          (qkv.head_dim % kChunk == 0 && aligned(qkv.pages.keys) && aligned(qkv.pages.values)));
}

/// Rows of a weight that a launch multiplies.
struct RowRange {
  std::int64_t first;  ///< a multiple of kBlockRows
  std::int64_t count;
};

template <typename T>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, const RowRange& range,
            const WgmmaChoice& choice, cudaStream_t stream) {
  const auto kernel = wgmma_kernel<T>;
  MOQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kBlockShared));
  WgmmaWalk walk{.steps = static_cast<int>(pad_to(layout.k, kStepCols) / kStepCols),
                 .first_row_block = static_cast<int>(range.first / kBlockRows),
                 .row_tiles = static_cast<int>(pad_to(range.count, T::kRows) / T::kRows),
                 .token_tiles = static_cast<int>(pad_to(args.m, T::kTokens) / T::kTokens),
                 .clusters = 0,
                 .split = 1,
                 .token_bytes = T::kTokenBytes,
                 .stores = can_store(args, layout),
                 .next = {}};
  const std::int64_t tiles = static_cast<std::int64_t>(walk.row_tiles) * walk.token_tiles;
  walk.split = T::kSplits ? choice.split : 1;
  const int most_parts = std::min(walk.steps, T::kMostParts);
  if (T::kAnyParts) {
    walk.split = std::min(walk.split, most_parts);
  }
  while (walk.split > most_parts) {
    walk.split /= 2;
  }
  // Tokens that do not exist are not asked for: the memory of those that a tile lacks is read, but
  // what comes of them is not written.
  const int box_tokens = static_cast<int>(std::min<std::int64_t>(args.m, T::kTokens));
  walk.token_bytes = box_tokens * kStepCols * 2;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(walk.split), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(walk.split));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kBlockShared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  // A cluster that splits columns takes one tile: what its blocks send each other comes once.
  const std::int64_t at_once = required_clusters(kernel, config);
  walk.clusters = static_cast<int>(T::kSplits ? tiles : std::min(tiles, at_once));
  config.gridDim = dim3(static_cast<unsigned>(walk.clusters * walk.split));
  config.numAttrs = kernels_may_overlap() ? 2 : 1;
  walk.next = next_weight_of(args, config.gridDim.x);
  const WgmmaMaps maps = wgmma_maps(
      args, layout, {.tokens = box_tokens, .row_blocks = T::kRowBlocks, .groups = T::kGridGroups});
  launch_kernel(config, kernel, maps, args, layout, walk);
}

template <bool kBFloat16, int kElementBytes, bool kGroups>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, const RowRange& range,
            const WgmmaChoice& choice, cudaStream_t stream) {
  const auto with = [&]<typename A>(A) {
    launch<WgmmaTileOf<kBFloat16, kElementBytes, kGroups, A>>(args, layout, range, choice, stream);
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
    case WgmmaTile::k192x128:
      if constexpr (!kGroups) {
        return with(WgmmaArrangement<3, 128, false>());
      }
      [[fallthrough]];
    case WgmmaTile::k128x128:
      return with(WgmmaArrangement<2, 128, true>());
    case WgmmaTile::k64x128:
      if constexpr (!kGroups) {
        return with(WgmmaArrangement<1, 128, false>());
      }
      [[fallthrough]];
    case WgmmaTile::k64x96:
      if constexpr (!kGroups) {
        if constexpr (kElementBytes == 1) {
          if (choice.split > 1) {
            return with(WgmmaArrangement<1, 96, true>());
          }
        }
        return with(WgmmaArrangement<1, 96, false>());
      }
      [[fallthrough]];
    case WgmmaTile::k64x64:
      return with(WgmmaArrangement<1, 64, true>());
    case WgmmaTile::k64x32:
      return with(WgmmaArrangement<1, 32, true>());
    case WgmmaTile::k64x16:
      return with(WgmmaArrangement<1, 16, true>());
  }
}

template <bool kBFloat16>
void launch(const DeviceLinearArgs& args, const DeviceLayout& layout, const RowRange& range,
            const WgmmaChoice& choice, cudaStream_t stream) {
  if (layout.element_bytes == 2) {
    return launch<kBFloat16, 2, false>(args, layout, range, choice, stream);
  }
  layout.groups == 1 ? launch<kBFloat16, 1, false>(args, layout, range, choice, stream)
                     : launch<kBFloat16, 1, true>(args, layout, range, choice, stream);
}

/// What multiplying rows of a weight takes, as kWgmmaCosts has it.
class Costs {
 public:
  Costs(const DeviceLinearArgs& args, const DeviceLayout& layout)
      : args_(args), layout_(layout), steps_(pad_to(layout.k, kStepCols) / kStepCols) {}

  /// Whether the costs are of such a product.
  bool fit(const WgmmaCost& cost) const {
    // Its costs were fitted to so many tokens at most: more would read the weight several times.
    const bool for_few = cost.tokens <= 32;
    const bool enough_steps =
        cost.least_steps == 0 || (layout_.element_bytes == 1 && steps_ >= cost.least_steps);
    return cost.groups == (layout_.groups > 1) && enough_steps &&
           (!for_few || args_.m <= cost.tokens);
  }
  std::int64_t token_tiles(const WgmmaCost& cost) const {
    return pad_to(args_.m, cost.tokens) / cost.tokens;
  }
  /// Blocks that run at once.
  double places(const WgmmaCost& cost) const { return cost.blocks * multiprocessors_; }
  /// Microseconds.
  double time(const WgmmaCost& cost, std::int64_t rows) const {
    const int split = cost.choice.split;
    const auto blocks =
        static_cast<double>(pad_to(rows, cost.rows) / cost.rows * token_tiles(cost) * split);
    const double waves = std::ceil(blocks / places(cost));
    const double step = blocks > multiprocessors_ ? cost.step_crowded : cost.step_alone;
    return waves * (cost.tile + step * static_cast<double>((steps_ + split - 1) / split));
  }
  /// The quickest for so many rows, and its time.
  std::pair<const WgmmaCost*, double> best(std::int64_t rows) const {
    std::pair<const WgmmaCost*, double> best{nullptr, 0.0};
    for (const WgmmaCost& cost : kWgmmaCosts) {
      if (fit(cost)) {
        const double own = time(cost, rows);
        if (best.first == nullptr || own < best.second) {
          best = {&cost, own};
        }
      }
    }
    return best;
  }

 private:
  const DeviceLinearArgs& args_;
  const DeviceLayout& layout_;
  std::int64_t steps_;
  double multiprocessors_ = static_cast<double>(device_limits().multiprocessors);
};

}  // namespace

bool can_wgmma(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  using Any = WgmmaTileOf<false, 1, false, WgmmaArrangement<1, 64, true>>;
  return suits_tensor_cores(args, layout) && args.norm.kind == NormKind::kNone &&
         args.input_stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(args.input) % 16 == 0 &&
         architecture_of(wgmma_kernel<Any>) == 90;
}

WgmmaPlan choose_wgmma(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  const Costs costs(args, layout);
  auto [whole, best_time] = costs.best(layout.n);
  WgmmaPlan best{whole->choice, layout.n, whole->choice};
  for (const WgmmaCost& cost : kWgmmaCosts) {
    if (!costs.fit(cost) || cost.choice.split > 1) {
      continue;
    }
    // As many tiles of rows as fill the GPU some times.
    const std::int64_t token_tiles = costs.token_tiles(cost);
    const double all = static_cast<double>(layout.n / cost.rows * token_tiles);
    const double full = std::floor(all / costs.places(cost)) * costs.places(cost);
    const std::int64_t rows = static_cast<std::int64_t>(full) / token_tiles * cost.rows;
    if (rows == 0 || rows >= layout.n) {
      continue;
    }
    const auto [rest, rest_time] = costs.best(layout.n - rows);
    const double time = costs.time(cost, rows) + rest_time + kSecondLaunch;
    if (time < best_time) {
      best = {cost.choice, rows, rest->choice};
      best_time = time;
    }
  }
  return best;
}

void wgmma_linear(const DeviceLinearArgs& args, const DeviceLayout& layout, const WgmmaPlan& plan,
                  cudaStream_t stream) {
  const auto multiply = [&](const RowRange& range, const WgmmaChoice& choice) {
    args.dtype == DType::kBFloat16 ? launch<true>(args, layout, range, choice, stream)
                                   : launch<false>(args, layout, range, choice, stream);
  };
  multiply({0, std::min(plan.rows, layout.n)}, plan.first);
  if (plan.rows < layout.n) {
    multiply({plan.rows, layout.n - plan.rows}, plan.rest);
  }
}

}  // namespace moq::kernels::cuda
