// Attention of few queries for many keys: a token of each sequence while decoding, or a few tokens
// that are appended at once.
//
// The rows of a kv head (its query heads, times the tokens) fill one tile of tensor-core products.
// The keys of the sequence are dealt in spans to the blocks of a cluster and in tiles of 16 to the
// warps of a block; each warp brings its tiles through its own ring. What the warps have is merged
// by the block, and the blocks' parts are sent to those of the cluster that have keys: each
// finishes some of the output. All orders are fixed. Blocks for which there are no keys end at
// once: a launch depends on the number of sequences and not on their lengths.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/attention_merge.h"
#include "kernels/cuda/attention_products.h"
#include "kernels/cuda/attention_softmax.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/launch.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = kMergeWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileKeys = 16;            // that a warp multiplies at once
constexpr int kLeastSpan = 32;           // keys that are worth a block
constexpr int kUsualSplit = 8;           // largest that every GPU with clusters can place
constexpr std::int64_t kLongSpan = 512;  // keys of a block of a long sequence
/// Of two blocks with more, only one finds room on a multiprocessor beside a block of the linear
/// kernel ahead or behind: the other begins late and lets that of the kernel behind begin late.
constexpr int kLargeBytes = 56 << 10;
constexpr int kWholeBytes = 120 << 10;  // of two blocks with more, none finds room beside the other

/// How a warp's tiles lie in shared memory.
template <bool kInt8, int kDim>
struct Ring {
  static constexpr int kStageBytes = TileLayout<kInt8, kDim>::stage_bytes(kTileKeys);
  static constexpr int kStages = std::clamp((11 << 10) / kStageBytes, 2, 4);
  static constexpr int kPartialStride = kDim + kQuad;  // floats; the rows of a warp's sums
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static_assert(kRowsOfTile * kPartialStride * 4 <= kWarpBytes);
};

/// Keys of each block of a cluster but the last that has some: a multiple of kTileKeys.
__device__ inline int span_of(int keys, int split, float inverse_split) {
  const int tiles = (keys + kTileKeys - 1) / kTileKeys;
  int tiles_of_block = static_cast<int>(static_cast<float>(tiles) * inverse_split);
  while (tiles_of_block * split < tiles) {  // once or never, but for rounding
    ++tiles_of_block;
  }
  return max(kLeastSpan, tiles_of_block * kTileKeys);
}

/// kDim: head_dim, rounded up to a compiled one.
template <bool kBFloat16, bool kInt8, int kDim>
__global__ void __launch_bounds__(kThreads)
    split_kernel(DeviceAttentionArgs args, int row_tiles, int split, int inbox_quads) {
  using Element = typename ElementOf<kBFloat16>::Type;
  using WarpRing = Ring<kInt8, kDim>;
  extern __shared__ __align__(128) std::uint8_t shared[];
  __shared__ float4 references[kRowsOfTile];  // of the warps
  __shared__ float4 sums[kRowsOfTile];
  auto* inbox = reinterpret_cast<float4*>(shared + kWarps * WarpRing::kWarpBytes);
  auto* inbox_sums = reinterpret_cast<float2*>(inbox + inbox_quads);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int rank = static_cast<int>(blockIdx.x) % split;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ std::uint64_t received;
  if (split > 1) {
    if (thread == 0) {
      init_barrier(shared_address(&received));
      publish_barriers();
    }
    meet_cluster();
  }
#endif
  allow_next_kernel();

  // ---- what this block has to do
  const auto num_kv_heads = static_cast<int>(args.num_kv_heads);
  const auto head_dim = static_cast<int>(args.head_dim);
  const int group = static_cast<int>(args.num_heads) / num_kv_heads;
  const int work = static_cast<int>(blockIdx.x) / split;
  const int sequence_index = work / (row_tiles * num_kv_heads);
  const int kv_head = work % (row_tiles * num_kv_heads) / row_tiles;
  const int first_row = work % row_tiles * kRowsOfTile;
  const RowMap row_map(first_row, group);
  const int quads = head_dim / kQuad;
  const float inverse_quads = 1.0F / static_cast<float>(quads);
  const float inverse_split = 1.0F / static_cast<float>(split);
  if (!args.past_is_ready) {
    wait_for_previous_kernels();
  }
  const DeviceSequence sequence = args.sequences[sequence_index];
  const int rows = min(sequence.num_tokens * group - first_row, kRowsOfTile);
  const int past = args.pages.keys == nullptr ? 0 : sequence.past_length;
  const int keys = past + sequence.num_tokens;
  const int span = span_of(keys, split, inverse_split);
  const int begin = rank * span;
  const int end = min(keys, begin + span);
  if (rows <= 0 || begin >= end) {
    wait_for_previous_kernels();  // the next kernel relies on this one not to end before them
    return;
  }

  const auto element_of = [&](const RowMap::Place& place, std::int64_t stride) {
    return (sequence.token_begin + static_cast<std::int64_t>(place.token)) * stride +
           static_cast<std::int64_t>(kv_head * group + place.head) * head_dim;
  };

  // ---- this warp's tiles, and the ring that brings them
  std::uint8_t* ring = shared + warp * WarpRing::kWarpBytes;
  const auto first_of = [&](int tile) { return begin + (warp + tile * kWarps) * kTileKeys; };
  const auto stage_of = [&](int tile) {
    return shared_address(ring + tile % WarpRing::kStages * WarpRing::kStageBytes);
  };
  // A lane looks up the page of one tile, for the next 32 of them.
  const auto pages_from = [&](int tile) {
    const int first = first_of(tile + lane);
    return first < end ? page_of(args, sequence, first) : 0;
  };
  std::int32_t pages = pages_from(0);
  const auto fill = [&](int tile) {
    const int first = first_of(tile);
    const std::int32_t page = __shfl_sync(0xffffffffU, pages, tile % kWarpSize);
    if (first < end) {
      const KeySource source = keys_from<kInt8>(args, sequence, kv_head, page, first);
#pragma unroll 1
      for (int kind = 0; kind < 2; ++kind) {
        copy_keys<kInt8, kDim, kTileKeys, kWarpSize>(stage_of(tile), source, kind, end - first,
                                                     head_dim, lane);
      }
    }
    close_async_group();
    if (tile % kWarpSize == kWarpSize - 1) {
      pages = pages_from(tile + 1);
    }
  };
  // Past keys come first: what new tokens added may not be there yet, and neither are queries.
  bool waits = args.past_is_ready;
#pragma unroll 1
  for (int tile = 0; tile < WarpRing::kStages; ++tile) {
    if (waits && first_of(tile) + kTileKeys > past) {
      wait_for_previous_kernels();
      waits = false;
    }
    fill(tile);
  }
  if (waits) {
    wait_for_previous_kernels();
  }
  auto* queries = reinterpret_cast<std::uint8_t*>(inbox_sums + inbox_quads);
  each_piece<kRowsOfTile, kDim / 8, kThreads>(thread, [&](int row, int chunk) {
    if (row < rows) {
      uint4 piece{};
      if (chunk < head_dim / 8) {
        piece = *reinterpret_cast<const uint4*>(static_cast<const Element*>(args.query) +
                                                element_of(row_map.at(row), args.query_stride) +
                                                chunk * 8);
      }
      *reinterpret_cast<uint4*>(queries + row * kQueryRowBytes<kDim> + chunk * 16) = piece;
    }
  });
  __syncthreads();
  std::uint32_t query[kDim / 16][4];
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    query_fragments<kInt8, kDim>(shared_address(queries), rows, step, lane, query[step]);
  }
  const auto query_of = [&](int step, std::uint32_t(&a)[1][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[0][i] = query[step][i];
    }
  };
  Sight sights[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sights[half] = sight_of(args, kv_head, group, row_map.at(g + 8 * half), past, keys);
  }
  const auto sight = [&](int, int half) { return sights[half]; };
  const float scale = args.scale * std::numbers::log2e_v<float>;

  Softmax<1> softmax;
  float output[1][kDim / 8][4] = {};
  for (int tile = 0; first_of(tile) < end; ++tile) {
    wait_async_groups<WarpRing::kStages - 1>();
    __syncwarp();
    attend<kBFloat16, kInt8, kDim, kTileKeys, 1>(stage_of(tile), query_of, sight, first_of(tile),
                                                 tile == 0, true, args.alibi_slopes != nullptr,
                                                 scale, lane, softmax, output);
    __syncwarp();
    fill(tile + WarpRing::kStages);
  }
  wait_async_groups<0>();
  __syncwarp();

  // ---- the warps' sums, where their tiles were
  auto* partial = reinterpret_cast<float*>(ring);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
    const float sum = sum_of_row(softmax.sum[0][half]);
    if (row < rows) {
      float* target = partial + row * WarpRing::kPartialStride;
      if constexpr (kInt8) {  // tiles of a piece have neighbouring dimensions
#pragma unroll
        for (int n = 0; n < kDim / 8; n += 4) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int i = 2 * half + e;
            *reinterpret_cast<float4*>(target + dim_of<kInt8>(n, t, e)) = {
                output[0][n][i], output[0][n + 1][i], output[0][n + 2][i], output[0][n + 3][i]};
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          *reinterpret_cast<float2*>(target + dim_of<kInt8>(n, t, 0)) = {
              output[0][n][2 * half], output[0][n][2 * half + 1]};
        }
      }
      if (t == 0) {
        reinterpret_cast<float*>(&references[row])[warp] =
            sum == 0.0F ? kNoKeys : reference_of(softmax.largest[0][half], scale);
        reinterpret_cast<float*>(&sums[row])[warp] = sum;
      }
    }
  }
  __syncthreads();

  const WarpParts parts{references, sums, shared, WarpRing::kWarpBytes, WarpRing::kPartialStride};
  const QuadGrid grid{rows, quads, inverse_quads};
  const auto store = [&](int row, int quad, const float4& products, float sum) {
    store_quad(static_cast<Element*>(args.output) +
                   element_of(row_map.at(row), args.output_stride) + quad * kQuad,
               products, __fdividef(1.0F, sum));
  };
  if (span >= keys) {
    return merge_block(parts, grid, store);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  int active = 1;  // blocks that have keys
  while (active * span < keys) {
    ++active;
  }
  merge_cluster(parts, grid, {inbox, inbox_sums, shared_address(&received)}, rank, active, store);
#endif
}

// --------------------------------------------------------------------------------------- launchers

/// Rows of tensor-core products that a (sequence, kv head) has at most.
std::int64_t most_rows(const DeviceAttentionArgs& args) {
  return args.max_tokens * (args.num_heads / args.num_kv_heads);
}

int rows_of_tile(const DeviceAttentionArgs& args) {
  return static_cast<int>(std::min<std::int64_t>(most_rows(args), kRowsOfTile));
}

/// Even, so that what lies behind the inbox is aligned as it is.
int inbox_quads(const DeviceAttentionArgs& args, int split) {
  const int quads = inbox_quads_of(rows_of_tile(args), static_cast<int>(args.head_dim), split);
  return split == 1 ? 0 : (quads + 1) / 2 * 2;
}

template <bool kInt8, int kDim>
std::size_t shared_bytes(const DeviceAttentionArgs& args, int split) {
  return kWarps * Ring<kInt8, kDim>::kWarpBytes + rows_of_tile(args) * kQueryRowBytes<kDim> +
         inbox_quads(args, split) * (sizeof(float4) + sizeof(float2));
}

/// Blocks that share the keys of a (sequence, kv head, tile of rows), of which there are `works`.
///
/// @param at_once   at_once(split): clusters of so many blocks that run at the same time
/// @param full      how much of that room is taken; what is left is for blocks of the next kernel
/// @param capacity  keys of the longest sequence that the page table has room for
template <typename AtOnce>
int split_of(std::int64_t works, std::int64_t capacity, double full, const AtOnce& at_once) {
  const auto turns = [&](int split) {
    return static_cast<double>(works) / static_cast<double>(at_once(split));
  };
  int best = 1;
  while (best < kUsualSplit && turns(best + 1) <= full) {
    ++best;
  }
  const std::int64_t multiprocessors = device_limits().multiprocessors;
  if (works * best < multiprocessors && turns(kMaxSplit) <= 1.0 &&
      (works * kMaxSplit <= multiprocessors || capacity >= kMaxSplit * kLongSpan)) {
    return kMaxSplit;
  }
  // Where sequences may be long it is more important to fill the GPU, be it in several turns.
  const auto fill = [&](int split) { return turns(split) / std::ceil(turns(split)); };
  for (int split = best + 1; split <= kUsualSplit && capacity / split >= kLongSpan; ++split) {
    if (fill(split) > 1.1 * fill(best)) {
      best = split;
    }
  }
  return best;
}

template <bool kBFloat16, bool kInt8, int kDim>
void launch_split(const DeviceAttentionArgs& args, cudaStream_t stream) {
  const auto kernel = split_kernel<kBFloat16, kInt8, kDim>;
  const std::int64_t row_tiles = (most_rows(args) + kRowsOfTile - 1) / kRowsOfTile;
  const std::int64_t works = args.num_sequences * args.num_kv_heads * row_tiles;
  const bool clusters = architecture_of(kernel) >= 90;
  const std::int64_t capacity = args.page_table_stride * kPageTokens;
  const bool is_large = clusters && capacity < kMaxSplit * kLongSpan &&
                        shared_bytes<kInt8, kDim>(args, 1) > kLargeBytes;
  const std::size_t most_bytes =
      std::max<std::size_t>(shared_bytes<kInt8, kDim>(args, kMaxSplit), is_large ? kWholeBytes : 0);
  MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(most_bytes)));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = attributes;
  const auto configure = [&](int split) {
    attributes[0].val.clusterDim = {static_cast<unsigned>(split), 1, 1};
    config.gridDim = dim3(static_cast<unsigned>(split));
    config.dynamicSmemBytes = shared_bytes<kInt8, kDim>(args, split);
    config.numAttrs = 1;
  };
  const auto at_once = [&](int split) {
    configure(split);
    config.dynamicSmemBytes = is_large ? most_bytes : config.dynamicSmemBytes;
    return active_clusters(kernel, config);
  };
  if (clusters) {
    MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  const int split = clusters ? split_of(works, capacity, is_large ? 1.0 : 0.8, at_once) : 1;
  configure(split);
  config.gridDim = dim3(static_cast<unsigned>(works * split));
  config.numAttrs = !clusters ? 0 : kernels_may_overlap() ? 2 : 1;
  launch_kernel(config, kernel, args, static_cast<int>(row_tiles), split, inbox_quads(args, split));
}

template <bool kBFloat16, bool kInt8>
void launch_split(const DeviceAttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim <= 32) {
    return launch_split<kBFloat16, kInt8, 32>(args, stream);
  }
  if (args.head_dim <= 64) {
    return launch_split<kBFloat16, kInt8, 64>(args, stream);
  }
  if constexpr (!kInt8) {
    if (args.head_dim <= 80) {
      return launch_split<kBFloat16, kInt8, 80>(args, stream);
    }
  }
  if (args.head_dim <= 96) {
    return launch_split<kBFloat16, kInt8, 96>(args, stream);
  }
  if (args.head_dim <= 128) {
    return launch_split<kBFloat16, kInt8, 128>(args, stream);
  }
  if (args.head_dim <= 160) {
    return launch_split<kBFloat16, kInt8, 160>(args, stream);
  }
  launch_split<kBFloat16, kInt8, 256>(args, stream);
}

template <bool kBFloat16>
void launch_split(const DeviceAttentionArgs& args, cudaStream_t stream) {
  args.pages.keys != nullptr&& args.pages.dtype == DType::kInt8
      ? launch_split<kBFloat16, true>(args, stream)
      : launch_split<kBFloat16, false>(args, stream);
}

}  // namespace

bool can_split(const DeviceAttentionArgs& args) {
  constexpr std::size_t kFixedBytes = 4 << 10;
  const auto limit = static_cast<std::size_t>(device_limits().shared_bytes_per_multiprocessor);
  const int split = architecture_of(split_kernel<false, false, 256>) >= 90 ? kMaxSplit : 1;
  return suits_tensor_cores(args) && (args.max_tokens == 1 || most_rows(args) <= kRowsOfTile) &&
         (args.head_dim <= 128 || shared_bytes<false, 256>(args, split) + kFixedBytes <= limit);
}

void split_attention(const DeviceAttentionArgs& args, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch_split<true>(args, stream)
                                 : launch_split<false>(args, stream);
}

}  // namespace moq::kernels::cuda
