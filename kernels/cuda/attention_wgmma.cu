// Attention of many queries by wgmma (compute capability 9.0, sm_90a): prompts and long chunks of
// them.
//
// Warpgroups of a block take 64 rows (attention_tile.h) each of one kv head of one sequence, and
// one warpgroup brings keys and values into a ring for them. Scores of a tile of keys are
// multiplied while the values of the tile before are, and become probabilities while the latter go
// on: those stay in registers, from where they multiply the values. What shared memory holds of a
// row are blocks of 32 dimensions, as swizzle64 lays them out. How they come there is in
// attention_wgmma_ring.h.
#include <cuda_runtime.h>

#include <numbers>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/attention_softmax.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/attention_wgmma_ring.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/warp.h"
#include "kernels/cuda/wgmma.h"

namespace moq::kernels::cuda {
namespace {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kRowsBarrier = 1;  // number of the first warpgroup's

/// Multiplies, for 64 rows of a block, and writes the output.
template <bool kBFloat16, int kDim, typename Sizes>
__device__ __forceinline__ void consume(const DeviceAttentionArgs& args, const WideWork& work,
                                        const RowMap& map, const WideRing<Sizes>& ring,
                                        std::uint8_t* shared) {
  using Element = typename ElementOf<kBFloat16>::Type;
  constexpr int kKeyTiles = Sizes::kKeys / 8;
  constexpr int kKeySteps = Sizes::kKeys / 16;
  constexpr int kQueryBlockBytes = Sizes::kRows * kBlockRowBytes;
  constexpr int kKeyBlockBytes = Sizes::kKeys * kBlockRowBytes;
  const int consumer = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int group_row = consumer * kGroupRows;
  const int warp_row = group_row + warp * kRowsOfTile;

  auto* sights = reinterpret_cast<Sight*>(shared + Sizes::kSightOffset);
  if (lane < kRowsOfTile) {
    sights[warp_row + lane] =
        sight_of(args, work.kv_head, work.group, map.at(warp_row + lane), work.past, work.keys);
  }
  __syncwarp();
  const auto sight = [&](int, int half) { return sights[warp_row + g + 8 * half]; };
  const int least_limit = sights[warp_row].limit;
  const bool alibi = args.alibi_slopes != nullptr;
  const float scale = args.scale * std::numbers::log2e_v<float>;
  const std::uint64_t queries = rows_descriptor(ring.shared + group_row * kBlockRowBytes);

  Softmax<1> softmax;
  float flat_output[kDim / 2];
  float flat_scores[Sizes::kKeys / 2];
  auto& output = reinterpret_cast<float(&)[1][kDim / 8][4]>(flat_output);
  auto& scores = reinterpret_cast<float(&)[1][kKeyTiles][4]>(flat_scores);
  std::uint32_t probabilities[kKeySteps][4];
  float shrink[1][2];

  const auto begin_scores = [&](int stage) {
    const std::uint64_t keys = rows_descriptor(ring.tile(stage, 0));
    begin_products();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const std::uint64_t offset = step % 2 * 2;
      multiply_shared<kBFloat16>(flat_scores, queries + step / 2 * (kQueryBlockBytes / 16) + offset,
                                 keys + step / 2 * (kKeyBlockBytes / 16) + offset, step > 0);
    }
    close_products();
  };
  const auto begin_values = [&](int stage, int keeps) {
    const std::uint64_t values = columns_descriptor(ring.tile(stage, 1), kKeyBlockBytes);
    begin_products();
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      multiply_columns<kBFloat16>(flat_output, probabilities[step], values + step * 64,
                                  step > 0 ? 1 : keeps);
    }
    close_products();
  };
  /// Whether the output shrinks.
  const auto weigh = [&](int tile) {
    const int first = tile * Sizes::kKeys;
    if (alibi) {
      add_alibi(scores, sight, first, t);
    }
    if (first + Sizes::kKeys > least_limit) {
      hide_keys(scores, sight, first, t);
    }
    const float no_scales[kKeyTiles][2] = {};
    const bool shrinks = raise_references<false>(scores, softmax, scale, no_scales, shrink);
    exponentiate<false>(scores, softmax, scale, no_scales);
    return shrinks;
  };
  const auto round_probabilities = [&] {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&pair)[4] = scores[0][2 * step + i / 2];
        probabilities[step][i] = round_pair<kBFloat16>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
  };

  ring.wait_full(ring.queries_full(), 0);
  ring.wait_full(ring.full(0, 0), 0);
  begin_scores(0);
  wait_products<0>();
  hold(flat_scores);
  ring.free(0, 0);
  weigh(0);
  round_probabilities();
  int stage = 0;  // of the tile before
  int parity = 0;
  for (int tile = 1; tile < work.tiles; ++tile) {
    const int next = stage + 1 == Sizes::kStages ? 0 : stage + 1;
    const int next_parity = parity ^ (next == 0 ? 1 : 0);
    ring.wait_full(ring.full(next, 0), next_parity);
    begin_scores(next);
    ring.wait_full(ring.full(stage, 1), parity);
    begin_values(stage, tile > 1);
    wait_products<1>();
    hold(flat_scores);
    ring.free(next, 0);
    const bool shrinks = weigh(tile);
    if (softmax.sum[0][0] + softmax.sum[0][1] < 0.0F) {
      // Never: but a branch that the probabilities decide keeps them from being made only when the
      // products that run meanwhile have ended.
      arrive(ring.queries_full());
    }
    wait_products<0>();
    hold(flat_output);
    hold(flat_scores);
#pragma unroll
    for (auto& fragment : probabilities) {
      hold(fragment);
    }
    ring.free(stage, 1);
    if (shrinks) {
      shrink_output(output, shrink);
    }
    round_probabilities();
    stage = next;
    parity = next_parity;
  }
  ring.wait_full(ring.full(stage, 1), parity);
  begin_values(stage, work.tiles > 1);
  wait_products<0>();
  hold(flat_output);
#pragma unroll
  for (auto& fragment : probabilities) {
    hold(fragment);
  }

  // ---- finished rows, by way of shared memory, where the queries were: products of other warps
  // of the warpgroup have to have read them too
  meet<kWarpgroup>(kRowsBarrier + consumer);
  constexpr int kChunks = kBlockRowBytes / 16;
  const auto chunk_at = [&](int row, int chunk) {
    return shared + chunk / kChunks * kQueryBlockBytes + (warp_row + row) * kBlockRowBytes +
           swizzle64(row, chunk % kChunks) * 16;
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = __fdividef(1.0F, sum_of_row(softmax.sum[0][half]));
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      *reinterpret_cast<std::uint32_t*>(chunk_at(g + 8 * half, n) + 4 * t) = round_pair<kBFloat16>(
          output[0][n][2 * half] * inverse, output[0][n][2 * half + 1] * inverse);
    }
  }
  __syncwarp();
  auto* target = static_cast<Element*>(args.output);
  each_piece<kRowsOfTile, kDim / 8, kWarpSize>(lane, [&](int row, int chunk) {
    const Sight own = sights[warp_row + row];
    const auto piece = *reinterpret_cast<const uint4*>(chunk_at(row, chunk));
    if (own.position < work.keys && chunk < args.head_dim / 8) {
      const std::int64_t token = work.sequence.token_begin + own.position - work.past;
      *reinterpret_cast<uint4*>(target + token * args.output_stride +
                                (work.kv_head * work.group + own.head) * args.head_dim +
                                chunk * 8) = piece;
    }
  });
}

#endif

template <bool kBFloat16, int kDim, bool kMany>
__global__ void __launch_bounds__(Wide<kDim, kMany>::kThreads, 1)
    wide_kernel(const __grid_constant__ DeviceAttentionArgs args, int row_blocks) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Sizes = Wide<kDim, kMany>;
  extern __shared__ __align__(1024) std::uint8_t shared[];
  const WideRing<Sizes> ring{shared_address(shared)};
  allow_next_kernel();
  if (threadIdx.x == 0) {
    ring.init();
  }
  if (args.pages.keys != nullptr) {
    clear_padding<kDim>(ring, static_cast<int>(args.head_dim));
  }
  // ---- what this block has to do. The last rows of a causal sequence see the most keys: they
  // begin first.
  const auto num_kv_heads = static_cast<int>(args.num_kv_heads);
  const int group = static_cast<int>(args.num_heads) / num_kv_heads;
  const int works = num_kv_heads * static_cast<int>(args.num_sequences);
  const int own = static_cast<int>(blockIdx.x) % works;
  const RowMap map((row_blocks - 1 - static_cast<int>(blockIdx.x) / works) * Sizes::kRows, group);
  wait_for_previous_kernels();
  WideWork work;
  work.sequence = args.sequences[own / num_kv_heads];
  work.kv_head = own % num_kv_heads;
  work.group = group;
  work.past = args.pages.keys == nullptr ? 0 : work.sequence.past_length;
  work.keys = work.past + work.sequence.num_tokens;
  const int end =
      args.causal ? min(work.past + map.at(Sizes::kRows - 1).token + 1, work.keys) : work.keys;
  work.tiles = (end + Sizes::kKeys - 1) / Sizes::kKeys;
  if (map.at(0).token >= work.sequence.num_tokens) {
    return;
  }
  __syncthreads();

  // A shuffle tells the compiler that a warp's lanes agree.
  if (__shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarpgroup, 0) ==
      Sizes::kConsumers) {
    shrink_registers<Sizes::kProducerRegisters>();
    produce<kDim>(args, work, map, ring);
  } else {
    grow_registers<Sizes::kConsumerRegisters>();
    consume<kBFloat16, kDim>(args, work, map, ring, shared);
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "compute capability 9.0 is built as 90a"
#endif
}

// --------------------------------------------------------------------------------------- launchers

template <bool kBFloat16, int kDim, bool kMany>
void launch_wide(const DeviceAttentionArgs& args, cudaStream_t stream) {
  using Sizes = Wide<kDim, kMany>;
  const std::int64_t row_blocks = row_blocks_of(args, Sizes::kRows);
  const std::int64_t blocks = row_blocks * args.num_sequences * args.num_kv_heads;
  launch(wide_kernel<kBFloat16, kDim, kMany>, dim3(static_cast<unsigned>(blocks)),
         dim3(Sizes::kThreads), Sizes::kSharedBytes, stream, args, static_cast<int>(row_blocks));
}

template <bool kBFloat16, int kDim>
void launch_wide(const DeviceAttentionArgs& args, cudaStream_t stream) {
  if constexpr (kKnowsMany<kDim>) {
    using Many = Wide<kDim, true>;
    // Rows that fill several blocks of a sequence, and blocks that fill the GPU several times.
    constexpr std::int64_t kManyWaves = 3;
    const std::int64_t row_blocks = row_blocks_of(args, Many::kRows);
    if (kDim == 64 ? row_blocks > 2
                   : row_blocks * args.num_sequences * args.num_kv_heads >=
                         kManyWaves * device_limits().multiprocessors) {
      return launch_wide<kBFloat16, kDim, true>(args, stream);
    }
  }
  launch_wide<kBFloat16, kDim, false>(args, stream);
}

template <bool kBFloat16>
void launch_wide(const DeviceAttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim <= 64) {
    return launch_wide<kBFloat16, 64>(args, stream);
  }
  if (args.head_dim <= 80) {
    return launch_wide<kBFloat16, 80>(args, stream);
  }
  if (args.head_dim <= 96) {
    return launch_wide<kBFloat16, 96>(args, stream);
  }
  if (args.head_dim <= 128) {
    return launch_wide<kBFloat16, 128>(args, stream);
  }
  if (args.head_dim <= 160) {
    return launch_wide<kBFloat16, 160>(args, stream);
  }
  if (args.head_dim <= 192) {
    return launch_wide<kBFloat16, 192>(args, stream);
  }
  launch_wide<kBFloat16, 256>(args, stream);
}

}  // namespace

bool can_wide(const DeviceAttentionArgs& args) {
  return suits_tensor_cores(args) &&
         (args.pages.keys == nullptr || args.pages.dtype == args.dtype) &&
         architecture_of(wide_kernel<false, 64, false>) == 90;
}

bool prefers_wide(const DeviceAttentionArgs& args) {
  // Measured on an H100. Fewer rows leave most of a block idle.
  using Few = Wide<64, false>;
  const std::int64_t rows = args.max_tokens * (args.num_heads / args.num_kv_heads);
  if (args.head_dim > 64 || rows > 4 * Few::kRows) {
    return rows >= Few::kRows;
  }
  // Short rows: flash_attention has more blocks, and several a multiprocessor.
  const std::int64_t blocks =
      row_blocks_of(args, Few::kRows) * args.num_sequences * args.num_kv_heads;
  const std::int64_t multiprocessors = device_limits().multiprocessors;
  return rows >= Few::kRows && 3 * blocks >= multiprocessors && blocks <= multiprocessors;
}

void wide_attention(const DeviceAttentionArgs& args, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch_wide<true>(args, stream)
                                 : launch_wide<false>(args, stream);
}

}  // namespace moq::kernels::cuda
