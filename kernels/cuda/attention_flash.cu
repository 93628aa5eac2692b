// Attention of many queries: prompts, chunks of them, and encoders, without padding.
//
// A block of four warps takes rows (attention_tile.h) of one kv head of one sequence and walks over
// the keys that they may see, a page at a time, through a ring of tiles that is filled in the
// background. Scores and probabilities live in registers. Where there is much work, a warp takes
// two tiles of rows, which halves what it reads from shared memory; else one, which makes more
// blocks.
#include <cuda_runtime.h>

#include <numbers>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/attention_products.h"
#include "kernels/cuda/attention_softmax.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/launch.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

template <bool kInt8, int kDim, int kRowTiles>
struct Shape {
  static constexpr int kRows = kWarps * kRowsOfTile * kRowTiles;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // of a tile; never more than a page
  static constexpr int kStageBytes = TileLayout<kInt8, kDim>::stage_bytes(kKeys);
  static constexpr int kStages = kStageBytes <= (20 << 10) ? 3 : 2;
  static constexpr int kQueryBytes = kRows * kQueryRowBytes<kDim>;
  static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes;
  /// Blocks of a multiprocessor, for the compiler's choice of registers.
  static constexpr int kBlocks = kDim <= 64 && kRowTiles == 1 ? 3 : 2;
};

/// kDim: head_dim, rounded up to a compiled one.
template <bool kBFloat16, bool kInt8, int kDim, int kRowTiles>
__global__ void __launch_bounds__(kThreads, Shape<kInt8, kDim, kRowTiles>::kBlocks)
    flash_kernel(DeviceAttentionArgs args, int row_blocks) {
  using Sizes = Shape<kInt8, kDim, kRowTiles>;
  using Element = typename ElementOf<kBFloat16>::Type;
  extern __shared__ __align__(128) std::uint8_t shared[];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int g = lane / 4;
  allow_next_kernel();

  // ---- what this block has to do. The last rows of a causal sequence see the most keys: they
  // begin first.
  const auto num_kv_heads = static_cast<int>(args.num_kv_heads);
  const auto head_dim = static_cast<int>(args.head_dim);
  const int group = static_cast<int>(args.num_heads) / num_kv_heads;
  const int works = num_kv_heads * static_cast<int>(args.num_sequences);
  const int work = static_cast<int>(blockIdx.x) % works;
  const int kv_head = work % num_kv_heads;
  const int sequence_index = work / num_kv_heads;
  const RowMap map((row_blocks - 1 - static_cast<int>(blockIdx.x) / works) * Sizes::kRows, group);
  const int warp_row = warp * kRowsOfTile * kRowTiles;  // of the block
  const int first_token = map.at(0).token;
  const int last_token = map.at(Sizes::kRows - 1).token;
  const int first_of_warp = map.at(warp_row).token;
  const int last_of_warp = map.at(warp_row + kRowsOfTile * kRowTiles - 1).token;
  if (!args.past_is_ready) {
    wait_for_previous_kernels();
  }
  const DeviceSequence sequence = args.sequences[sequence_index];
  if (first_token >= sequence.num_tokens) {
    wait_for_previous_kernels();  // the next kernel relies on this one not to end before them
    return;
  }
  const int past = args.pages.keys == nullptr ? 0 : sequence.past_length;
  const int keys = past + sequence.num_tokens;
  const auto limit_of = [&](int token) { return args.causal ? min(past + token + 1, keys) : keys; };
  const int end = limit_of(last_token);
  const int tiles = (end + Sizes::kKeys - 1) / Sizes::kKeys;

  // ---- queries, and the ring of keys and values
  const auto element_of = [&](int token, int head, std::int64_t stride) {
    return (sequence.token_begin + static_cast<std::int64_t>(token)) * stride +
           static_cast<std::int64_t>(kv_head * group + head) * head_dim;
  };
  const std::uint32_t queries = shared_address(shared);
  const std::uint32_t ring = queries + Sizes::kQueryBytes;
  const auto page_of_tile = [&](int tile) {
    return tile < tiles ? page_of(args, sequence, tile * Sizes::kKeys) : 0;
  };
  const auto fill = [&](int tile, int stage, std::int32_t page) {
    if (tile < tiles) {
      const int first = tile * Sizes::kKeys;
      const KeySource source = keys_from<kInt8>(args, sequence, kv_head, page, first);
#pragma unroll
      for (int kind = 0; kind < 2; ++kind) {
        copy_keys<kInt8, kDim, Sizes::kKeys, kThreads>(ring + stage * Sizes::kStageBytes, source,
                                                       kind, keys - first, head_dim, thread);
      }
    }
    close_async_group();
  };
  constexpr int kQueryChunks = kDim / 8;
  const auto* query = static_cast<const std::uint16_t*>(args.query);
  constexpr int kAhead = Sizes::kStages - 1;  // tiles under way
  std::int32_t pages[Sizes::kStages];
#pragma unroll
  for (int tile = 0; tile < Sizes::kStages; ++tile) {
    pages[tile] = page_of_tile(tile);
  }
  if (args.past_is_ready) {
    wait_for_previous_kernels();
  }
  each_piece<Sizes::kRows, kQueryChunks, kThreads>(thread, [&](int row, int chunk) {
    const RowMap::Place place = map.at(row);
    const bool exists = place.token < sequence.num_tokens && chunk < head_dim / 8;
    copy_async(
        queries + row * kQueryRowBytes<kDim> + chunk * 16,
        exists ? query + element_of(place.token, place.head, args.query_stride) + chunk * 8 : query,
        exists);
  });
#pragma unroll
  for (int tile = 0; tile < kAhead; ++tile) {
    fill(tile, tile, pages[tile]);
  }
  std::int32_t next_page = pages[kAhead];

  // ---- what this warp's rows see
  const int least_limit = limit_of(first_of_warp);
  const int warp_end = first_of_warp < sequence.num_tokens ? limit_of(last_of_warp) : 0;
  const auto sight_address = [&](int row) {  // in the unused bytes behind the row's queries
    return shared + (row + 1) * kQueryRowBytes<kDim> - static_cast<int>(sizeof(Sight));
  };
  if (thread < Sizes::kRows) {
    *reinterpret_cast<Sight*>(sight_address(thread)) =
        sight_of(args, kv_head, group, map.at(thread), past, keys);
  }
  const auto sight_at = [&](int row) {
    return *reinterpret_cast<const Sight*>(sight_address(row));
  };
  const auto sight = [&](int r, int half) {
    return sight_at(warp_row + r * kRowsOfTile + g + 8 * half);
  };
  const float scale = args.scale * std::numbers::log2e_v<float>;
  const std::uint32_t own_queries = queries + warp_row * kQueryRowBytes<kDim>;
  const auto query_of = [&](int step, std::uint32_t(&a)[kRowTiles][4]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      query_fragments<kInt8, kDim>(own_queries + r * kRowsOfTile * kQueryRowBytes<kDim>,
                                   kRowsOfTile, step, lane, a[r]);
    }
  };

  Softmax<kRowTiles> softmax;
  float output[kRowTiles][kDim / 8][4] = {};
  int stage = 0;            // of `tile`
  int free_stage = kAhead;  // of the next one to be filled
  for (int tile = 0; tile < tiles; ++tile) {
    wait_async_groups<kAhead - 1>();
    __syncthreads();  // the tile is here for all, and nobody reads the one before it any more
    fill(tile + kAhead, free_stage, next_page);
    next_page = page_of_tile(tile + kAhead + 1);
    free_stage = stage;
    const int first = tile * Sizes::kKeys;
    if (first < warp_end) {
      attend<kBFloat16, kInt8, kDim, Sizes::kKeys, kRowTiles>(
          ring + stage * Sizes::kStageBytes, query_of, sight, first, tile == 0,
          first + Sizes::kKeys > least_limit, args.alibi_slopes != nullptr, scale, lane, softmax,
          output);
    }
    stage = stage + 1 == Sizes::kStages ? 0 : stage + 1;
  }

  // ---- finished rows, by way of shared memory: this warp's queries are not needed any more
  __syncwarp();
  std::uint8_t* finished = shared + warp_row * kQueryRowBytes<kDim>;
  finish_rows<kBFloat16, kInt8, kDim>(finished, lane, softmax, output);
  __syncwarp();
  auto* target = static_cast<Element*>(args.output);
  each_piece<kRowsOfTile * kRowTiles, kQueryChunks, kWarpSize>(lane, [&](int row, int chunk) {
    const Sight own = sight_at(warp_row + row);
    const auto piece =
        *reinterpret_cast<const uint4*>(finished + row * kQueryRowBytes<kDim> + chunk * 16);
    Element* place = target + element_of(own.position - past, own.head, args.output_stride);
    if (own.position < keys && chunk < head_dim / 8) {
      *reinterpret_cast<uint4*>(place + chunk * 8) = piece;
    }
  });
}

// --------------------------------------------------------------------------------------- launchers

template <bool kBFloat16, bool kInt8, int kDim, int kRowTiles>
void launch_flash(const DeviceAttentionArgs& args, cudaStream_t stream) {
  using Sizes = Shape<kInt8, kDim, kRowTiles>;
  const std::int64_t row_blocks = row_blocks_of(args, Sizes::kRows);
  const std::int64_t blocks = row_blocks * args.num_sequences * args.num_kv_heads;
  launch(flash_kernel<kBFloat16, kInt8, kDim, kRowTiles>, dim3(static_cast<unsigned>(blocks)),
         dim3(kThreads), Sizes::kSharedBytes, stream, args, static_cast<int>(row_blocks));
}

template <bool kBFloat16, bool kInt8, int kDim>
void launch_flash(const DeviceAttentionArgs& args, cudaStream_t stream) {
  if constexpr (!kInt8 && kDim <= 128) {
    // Three blocks a multiprocessor: measured on an H100 with the shapes of BERT and GPT-2.
    using Wide = Shape<kInt8, kDim, 2>;
    const std::int64_t blocks =
        row_blocks_of(args, Wide::kRows) * args.num_sequences * args.num_kv_heads;
    if (blocks >= 3 * device_limits().multiprocessors && fits_in_shared(Wide::kSharedBytes)) {
      return launch_flash<kBFloat16, kInt8, kDim, 2>(args, stream);
    }
  }
  launch_flash<kBFloat16, kInt8, kDim, 1>(args, stream);
}

template <bool kBFloat16, bool kInt8>
void launch_flash(const DeviceAttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim <= 32) {
    return launch_flash<kBFloat16, kInt8, 32>(args, stream);
  }
  if (args.head_dim <= 64) {
    return launch_flash<kBFloat16, kInt8, 64>(args, stream);
  }
  if constexpr (!kInt8) {
    if (args.head_dim <= 80) {
      return launch_flash<kBFloat16, kInt8, 80>(args, stream);
    }
  }
  if (args.head_dim <= 96) {
    return launch_flash<kBFloat16, kInt8, 96>(args, stream);
  }
  if (args.head_dim <= 128) {
    return launch_flash<kBFloat16, kInt8, 128>(args, stream);
  }
  launch_flash<kBFloat16, kInt8, 256>(args, stream);
}

template <bool kBFloat16>
void launch_flash(const DeviceAttentionArgs& args, cudaStream_t stream) {
  args.pages.keys != nullptr&& args.pages.dtype == DType::kInt8
      ? launch_flash<kBFloat16, true>(args, stream)
      : launch_flash<kBFloat16, false>(args, stream);
}

}  // namespace

bool can_flash(const DeviceAttentionArgs& args) {
  return suits_tensor_cores(args) &&
         (args.head_dim <= 128 || fits_in_shared(Shape<false, 256, 1>::kSharedBytes));
}

void flash_attention(const DeviceAttentionArgs& args, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch_flash<true>(args, stream)
                                 : launch_flash<false>(args, stream);
}

}  // namespace moq::kernels::cuda
