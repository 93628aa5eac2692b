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
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/launch.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

/// kDim: head_dim, rounded up to a compiled one.
template <bool kInt8, int kDim, int kRowTiles>
struct Shape {
  static constexpr int kRows = kWarps * kRowsOfTile * kRowTiles;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // of a tile; never more than a page
  static constexpr int kStageBytes = TileLayout<kInt8, kDim>::stage_bytes(kKeys);
  static constexpr int kStages = kStageBytes <= (20 << 10) ? 3 : 2;
  static constexpr int kQueryRowBytes = kDim * 2 + 16;
  static constexpr int kQueryBytes = kRows * kQueryRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + kStages * kStageBytes;
  /// Blocks of a multiprocessor, for the compiler's choice of registers.
  static constexpr int kBlocks = kDim <= 64 ? 3 : 2;
};

/// The token and the head of row after row, without a division each.
class RowWalk {
 public:
  __device__ RowWalk(int row, int group) : token_(row / group), head_(row % group) {}
  __device__ void advance(int step_tokens, int step_heads, int group) {
    token_ += step_tokens;
    head_ += step_heads;
    if (head_ >= group) {
      head_ -= group;
      ++token_;
    }
  }
  /// Element of the row, in rows of tokens `stride` apart.
  __device__ std::int64_t element(const DeviceSequence& sequence, std::int64_t stride,
                                  int first_head, int head_dim) const {
    return (sequence.token_begin + static_cast<std::int64_t>(token_)) * stride +
           static_cast<std::int64_t>(first_head + head_) * head_dim;
  }

 private:
  int token_;
  int head_;
};

/// visit(row of the block, its element in rows `stride` apart, piece of 16 bytes of 16-bit numbers)
/// for each of the kCount rows from `first` on, kThreadCount threads sharing the pieces.
template <int kCount, int kChunks, int kThreadCount, typename Visitor>
__device__ void each_piece(const DeviceSequence& sequence, int first, int group, int first_head,
                           int head_dim, std::int64_t stride, int thread, const Visitor& visit) {
  using Pieces = PiecesOf<kChunks, kThreadCount>;
  const int chunk = Pieces::chunk(thread);
  if (chunk >= kChunks) {
    return;
  }
  RowWalk walk(first + Pieces::row(thread), group);
  const int step_tokens = Pieces::kStep / group;
  const int step_heads = Pieces::kStep % group;
#pragma unroll
  for (int row = 0; row < kCount; row += Pieces::kStep) {
    visit(row + Pieces::row(thread), walk.element(sequence, stride, first_head, head_dim), chunk);
    walk.advance(step_tokens, step_heads, group);
  }
}

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
  const int t = lane % 4;
  allow_next_kernel();
  wait_for_previous_kernels();

  // ---- what this block has to do. The last rows of a causal sequence see the most keys: they
  // begin first.
  const auto num_kv_heads = static_cast<int>(args.num_kv_heads);
  const auto head_dim = static_cast<int>(args.head_dim);
  const int group = static_cast<int>(args.num_heads) / num_kv_heads;
  const int works = num_kv_heads * static_cast<int>(args.num_sequences);
  const int work = static_cast<int>(blockIdx.x) % works;
  const int kv_head = work % num_kv_heads;
  const DeviceSequence sequence = args.sequences[work / num_kv_heads];
  const int first_row = (row_blocks - 1 - static_cast<int>(blockIdx.x) / works) * Sizes::kRows;
  const int all_rows = sequence.num_tokens * group;
  if (first_row >= all_rows) {
    return;
  }
  const int past = args.pages.keys == nullptr ? 0 : sequence.past_length;
  const int keys = past + sequence.num_tokens;
  const auto limit_of = [&](int row) {
    return args.causal ? past + min(row, all_rows - 1) / group + 1 : keys;
  };
  const int end = limit_of(first_row + Sizes::kRows - 1);
  const int tiles = (end + Sizes::kKeys - 1) / Sizes::kKeys;

  // ---- queries, and the ring of keys and values
  const std::uint32_t queries = shared_address(shared);
  const std::uint32_t ring = queries + Sizes::kQueryBytes;
  const auto page_of_tile = [&](int tile) {
    return tile < tiles ? page_of(args, sequence, tile * Sizes::kKeys) : 0;
  };
  const auto fill = [&](int tile, int stage, std::int32_t page) {
    if (tile < tiles) {
      const int first = tile * Sizes::kKeys;
      copy_keys<kInt8, kDim, Sizes::kKeys, kThreads>(
          ring + stage * Sizes::kStageBytes, keys_from<kInt8>(args, sequence, kv_head, page, first),
          keys - first, head_dim, thread);
    }
    close_async_group();
  };
  constexpr int kQueryChunks = kDim / 8;
  const auto* query = static_cast<const std::uint16_t*>(args.query);
  std::int32_t pages[Sizes::kStages];
#pragma unroll
  for (int tile = 0; tile < Sizes::kStages; ++tile) {
    pages[tile] = page_of_tile(tile);
  }
  each_piece<Sizes::kRows, kQueryChunks, kThreads>(
      sequence, first_row, group, kv_head * group, head_dim, args.query_stride, thread,
      [&](int row, std::int64_t element, int chunk) {
        const bool exists = first_row + row < all_rows && chunk < head_dim / 8;
        copy_async(queries + row * Sizes::kQueryRowBytes + chunk * 16,
                   exists ? query + element + chunk * 8 : query, exists);
      });
#pragma unroll
  for (int tile = 0; tile < Sizes::kStages - 1; ++tile) {
    fill(tile, tile, pages[tile]);
  }
  std::int32_t next_page = pages[Sizes::kStages - 1];

  // ---- what this warp's rows see
  const int warp_row = warp * kRowsOfTile * kRowTiles;  // of the block
  const int least_limit = limit_of(first_row + warp_row);
  const int warp_end = first_row + warp_row < all_rows
                           ? limit_of(first_row + warp_row + kRowsOfTile * kRowTiles - 1)
                           : 0;
  const auto sight_address = [&](int row) {  // in the unused bytes behind the row's queries
    return shared + (row + 1) * Sizes::kQueryRowBytes - static_cast<int>(sizeof(Sight));
  };
  if (thread < Sizes::kRows) {
    *reinterpret_cast<Sight*>(sight_address(thread)) =
        sight_of(args, kv_head, group, min(first_row + thread, all_rows - 1), past, keys);
  }
  const auto sight = [&](int r, int half) {
    return *reinterpret_cast<const Sight*>(
        sight_address(warp_row + r * kRowsOfTile + g + 8 * half));
  };
  const float scale = args.scale * std::numbers::log2e_v<float>;
  const std::uint32_t own_queries = queries + warp_row * Sizes::kQueryRowBytes;
  const auto query_of = [&](int step, std::uint32_t(&a)[kRowTiles][4]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const std::uint32_t rows = own_queries + r * kRowsOfTile * Sizes::kQueryRowBytes + 32 * step;
      if constexpr (kInt8) {  // four neighbouring dimensions (key_fragments)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                       : "=r"(a[r][half]), "=r"(a[r][half + 2])
                       : "r"(rows + (g + 8 * half) * Sizes::kQueryRowBytes + 8 * t)
                       : "memory");
        }
      } else {
        load_matrices(rows + (lane & 15) * Sizes::kQueryRowBytes + lane / 16 * 16, a[r]);
      }
    }
  };

  Softmax<kRowTiles> softmax;
  float output[kRowTiles][kDim / 8][4] = {};
  int stage = 0;
  int free_stage = Sizes::kStages - 1;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_async_groups<Sizes::kStages - 2>();
    __syncthreads();  // the tile is here for all, and nobody reads the one before it any more
    fill(tile + Sizes::kStages - 1, free_stage, next_page);
    next_page = page_of_tile(tile + Sizes::kStages);
    const int first = tile * Sizes::kKeys;
    if (first < warp_end) {
      attend<kBFloat16, kInt8, kDim, Sizes::kKeys, kRowTiles>(
          ring + stage * Sizes::kStageBytes, query_of, sight, first,
          first + Sizes::kKeys > least_limit, args.alibi_slopes != nullptr, scale, lane, softmax,
          output);
    }
    free_stage = stage;
    stage = stage + 1 == Sizes::kStages ? 0 : stage + 1;
  }

  // ---- finished rows, by way of shared memory: this warp's queries are not needed any more
  __syncwarp();
  std::uint8_t* finished = shared + warp_row * Sizes::kQueryRowBytes;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = 1.0F / sum_of_row(softmax.sum[r][half]);
      auto* row = reinterpret_cast<Element*>(finished + (r * kRowsOfTile + g + 8 * half) *
                                                            Sizes::kQueryRowBytes);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float low = output[r][n][2 * half] * inverse;
        const float high = output[r][n][2 * half + 1] * inverse;
        if constexpr (kInt8) {
          store_float(row + dim_of<kInt8>(n, t, 0), low);
          store_float(row + dim_of<kInt8>(n, t, 1), high);
        } else {
          *reinterpret_cast<std::uint32_t*>(row + dim_of<kInt8>(n, t, 0)) =
              round_pair<kBFloat16>(low, high);
        }
      }
    }
  }
  __syncwarp();
  auto* target = static_cast<Element*>(args.output);
  each_piece<kRowsOfTile * kRowTiles, kQueryChunks, kWarpSize>(
      sequence, first_row + warp_row, group, kv_head * group, head_dim, args.output_stride, lane,
      [&](int row, std::int64_t element, int chunk) {
        if (first_row + warp_row + row < all_rows && chunk < head_dim / 8) {
          *reinterpret_cast<uint4*>(target + element + chunk * 8) =
              *reinterpret_cast<const uint4*>(finished + row * Sizes::kQueryRowBytes + chunk * 16);
        }
      });
}

// --------------------------------------------------------------------------------------- launchers

template <int kRowTiles>
std::int64_t row_blocks_of(const DeviceAttentionArgs& args) {
  constexpr std::int64_t kRows = kWarps * kRowsOfTile * kRowTiles;
  return (args.max_tokens * (args.num_heads / args.num_kv_heads) + kRows - 1) / kRows;
}

bool fits_in_shared(std::int64_t bytes) {
  constexpr std::int64_t kReserved = 1 << 10;  // of each block, by the system
  return bytes + kReserved <= device_limits().shared_bytes_per_multiprocessor;
}

template <bool kBFloat16, bool kInt8, int kDim, int kRowTiles>
void launch_flash(const DeviceAttentionArgs& args, cudaStream_t stream) {
  const std::int64_t row_blocks = row_blocks_of<kRowTiles>(args);
  const std::int64_t blocks = row_blocks * args.num_sequences * args.num_kv_heads;
  launch(flash_kernel<kBFloat16, kInt8, kDim, kRowTiles>, dim3(static_cast<unsigned>(blocks)),
         dim3(kThreads), Shape<kInt8, kDim, kRowTiles>::kSharedBytes, stream, args,
         static_cast<int>(row_blocks));
}

template <bool kBFloat16, bool kInt8, int kDim>
void launch_flash(const DeviceAttentionArgs& args, cudaStream_t stream) {
  if constexpr (!kInt8 && kDim <= 128) {
    const std::int64_t wide = row_blocks_of<2>(args) * args.num_sequences * args.num_kv_heads;
    if (wide >= 2 * device_limits().multiprocessors &&
        fits_in_shared(Shape<kInt8, kDim, 2>::kSharedBytes)) {
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
