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
#include <limits>
#include <numbers>

#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/launch.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileKeys = 16;   // that a warp multiplies at once
constexpr int kLeastSpan = 32;  // keys that are worth a block
constexpr int kMaxSplit = 16;   // blocks of a cluster
constexpr int kUsualSplit = 8;  // largest that every GPU with clusters can place
constexpr int kQuad = 4;        // dimensions that a thread merges at once
/// The reference of sums of nothing: whatever they are merged with has a larger one.
constexpr float kNoKeys = -std::numeric_limits<float>::max();

/// How a warp's tiles lie in shared memory.
template <bool kInt8, int kDim>
struct Ring {
  static constexpr int kStageBytes = TileLayout<kInt8, kDim>::stage_bytes(kTileKeys);
  static constexpr int kStages = std::clamp((18 << 10) / kStageBytes, 2, 4);
  static constexpr int kPartialStride = kDim + kQuad;  // floats; the rows of a warp's sums
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static_assert(kRowsOfTile * kPartialStride * 4 <= kWarpBytes);
};

/// Quads of the output that there are room for in an inbox.
constexpr int inbox_quads(int rows, int head_dim, int split) {
  return rows * (head_dim / kQuad) + split;
}

template <typename Element>
__device__ void store_quad(Element* target, const float4& value) {
  struct alignas(kQuad * sizeof(Element)) Quad {
    Element element[kQuad];
  };
  Quad quad;
  store_float(&quad.element[0], value.x);
  store_float(&quad.element[1], value.y);
  store_float(&quad.element[2], value.z);
  store_float(&quad.element[3], value.w);
  *reinterpret_cast<Quad*>(target) = quad;
}

__device__ inline void add_scaled(float4& sum, const float4& value, float factor) {
  sum.x = fmaf(value.x, factor, sum.x);
  sum.y = fmaf(value.y, factor, sum.y);
  sum.z = fmaf(value.z, factor, sum.z);
  sum.w = fmaf(value.w, factor, sum.w);
}

__device__ inline float4 scaled(const float4& value, float factor) {
  return {value.x * factor, value.y * factor, value.z * factor, value.w * factor};
}

/// A fragments of 16 rows that lie anywhere in device memory, in registers.
template <bool kInt8, int kDim>
__device__ void load_query(const DeviceAttentionArgs& args, const DeviceSequence& sequence,
                           int first_head, int group, int first_row, int rows, int lane,
                           std::uint32_t (&query)[kDim / 16][4]) {
  const int t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const bool exists = row < rows;
    const int r = first_row + (exists ? row : 0);
    const std::int64_t token = sequence.token_begin + r / group;
    const auto* source = static_cast<const std::uint16_t*>(args.query) + token * args.query_stride +
                         (first_head + r % group) * args.head_dim;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      // A lane's columns are 2t, 2t + 1 and the same 8 behind; of codes (key_fragments) 4t to 4t+3.
      const int low = 16 * step + (kInt8 ? 4 * t : 2 * t);
      const int high = low + (kInt8 ? 2 : 8);
      const auto word = [&](int dim) {
        return exists && dim < args.head_dim ? *reinterpret_cast<const std::uint32_t*>(source + dim)
                                             : 0U;
      };
      query[step][half] = word(low);
      query[step][half + 2] = word(high);
    }
  }
}

/// kDim: head_dim, rounded up to a compiled one.
template <bool kBFloat16, bool kInt8, int kDim>
__global__ void __launch_bounds__(kThreads)
    split_kernel(DeviceAttentionArgs args, int row_tiles, int split) {
  using Element = typename ElementOf<kBFloat16>::Type;
  using WarpRing = Ring<kInt8, kDim>;
  extern __shared__ __align__(128) std::uint8_t shared[];
  __shared__ float references[kWarps][kRowsOfTile];
  __shared__ float sums[kWarps][kRowsOfTile];
  __shared__ float4 inbox_sums[kMaxSplit][kRowsOfTile / 2];  // (reference, sum) of rows
  __shared__ std::uint64_t received;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  const int g = lane / 4;
  const int t = lane % 4;
  const int rank = static_cast<int>(blockIdx.x) % split;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (split > 1) {
    if (thread == 0) {
      init_barrier(shared_address(&received));
      publish_barriers();
    }
    meet_cluster();
  }
#endif
  allow_next_kernel();
  wait_for_previous_kernels();

  // ---- what this block has to do
  const auto num_kv_heads = static_cast<int>(args.num_kv_heads);
  const auto head_dim = static_cast<int>(args.head_dim);
  const int group = static_cast<int>(args.num_heads) / num_kv_heads;
  int work = static_cast<int>(blockIdx.x) / split;
  const DeviceSequence sequence = args.sequences[work / (row_tiles * num_kv_heads)];
  work %= row_tiles * num_kv_heads;
  const int kv_head = work / row_tiles;
  const int first_row = work % row_tiles * kRowsOfTile;
  const int rows = min(sequence.num_tokens * group - first_row, kRowsOfTile);
  const int past = args.pages.keys == nullptr ? 0 : sequence.past_length;
  const int keys = past + sequence.num_tokens;
  const int span =
      max(kLeastSpan, (keys + split * kTileKeys - 1) / (split * kTileKeys) * kTileKeys);
  const int begin = rank * span;
  const int end = min(keys, begin + span);
  if (rows <= 0 || begin >= end) {
    return;
  }
  const int active = (keys + span - 1) / span;  // blocks of the cluster that have keys

  // ---- this warp's tiles, and the ring that brings them
  std::uint8_t* ring = shared + warp * WarpRing::kWarpBytes;
  const auto first_of = [&](int tile) { return begin + (warp + tile * kWarps) * kTileKeys; };
  const auto page_of_tile = [&](int tile) {
    const int first = first_of(tile);
    return first < end ? page_of(args, sequence, first) : 0;
  };
  const auto fill = [&](int tile, std::int32_t page) {
    const int first = first_of(tile);
    if (first < end) {
      copy_keys<kInt8, kDim, kTileKeys, kWarpSize>(
          shared_address(ring + tile % WarpRing::kStages * WarpRing::kStageBytes),
          keys_from<kInt8>(args, sequence, kv_head, page, first), end - first, head_dim, lane);
    }
    close_async_group();
  };
  std::int32_t pages[WarpRing::kStages + 1];
#pragma unroll
  for (int tile = 0; tile <= WarpRing::kStages; ++tile) {
    pages[tile] = page_of_tile(tile);
  }
#pragma unroll
  for (int tile = 0; tile < WarpRing::kStages; ++tile) {
    fill(tile, pages[tile]);
  }
  std::int32_t next_page = pages[WarpRing::kStages];

  std::uint32_t query[kDim / 16][4];
  load_query<kInt8, kDim>(args, sequence, kv_head * group, group, first_row, rows, lane, query);
  const auto query_of = [&](int step, std::uint32_t(&a)[1][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[0][i] = query[step][i];
    }
  };
  Sight sights[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sights[half] =
        sight_of(args, kv_head, group, first_row + min(g + 8 * half, rows - 1), past, keys);
  }
  const auto sight = [&](int, int half) { return sights[half]; };
  const float scale = args.scale * std::numbers::log2e_v<float>;

  Softmax<1> softmax;
  float output[1][kDim / 8][4] = {};
  for (int tile = 0; first_of(tile) < end; ++tile) {
    wait_async_groups<WarpRing::kStages - 1>();
    __syncwarp();
    attend<kBFloat16, kInt8, kDim, kTileKeys, 1>(
        shared_address(ring + tile % WarpRing::kStages * WarpRing::kStageBytes), query_of, sight,
        first_of(tile), true, args.alibi_slopes != nullptr, scale, lane, softmax, output);
    __syncwarp();
    fill(tile + WarpRing::kStages, next_page);
    next_page = page_of_tile(tile + WarpRing::kStages + 1);
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
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          partial[row * WarpRing::kPartialStride + dim_of<kInt8>(n, t, e)] =
              output[0][n][2 * half + e];
        }
      }
      if (t == 0) {
        references[warp][row] =
            sum == 0.0F ? kNoKeys : reference_of(softmax.largest[0][half], scale);
        sums[warp][row] = sum;
      }
    }
  }
  __syncthreads();

  // ---- merged by the block: (reference, sum) of a row, and a quad of its output
  const auto merged_reference = [&](int row) {
    float top = references[0][row];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      top = fmaxf(top, references[w][row]);
    }
    return top;
  };
  const auto merged_sum = [&](int row, float reference) {
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum = fmaf(sums[w][row], fast_exp2(references[w][row] - reference), sum);
    }
    return sum;
  };
  const auto merged_quad = [&](int row, int quad, float reference) {
    float4 sum{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const auto* own = reinterpret_cast<const float*>(shared + w * WarpRing::kWarpBytes) +
                        row * WarpRing::kPartialStride + quad * kQuad;
      add_scaled(sum, *reinterpret_cast<const float4*>(own),
                 fast_exp2(references[w][row] - reference));
    }
    return sum;
  };
  const int quads = head_dim / kQuad;
  const auto store = [&](int row, int quad, const float4& value) {
    const int r = first_row + row;
    const std::int64_t token = sequence.token_begin + r / group;
    store_quad(static_cast<Element*>(args.output) + token * args.output_stride +
                   (kv_head * group + r % group) * head_dim + quad * kQuad,
               value);
  };
  if (active == 1) {
    for (int i = thread; i < rows * quads; i += kThreads) {
      const int row = i / quads;
      const float reference = merged_reference(row);
      store(row, i % quads,
            scaled(merged_quad(row, i % quads, reference), 1.0F / merged_sum(row, reference)));
    }
    return;
  }

  // ---- and by the cluster
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const int share = (rows * quads + active - 1) / active;  // quads that a block finishes at most
  const int own_first = rank * share;
  const int own_quads = max(0, min(share, rows * quads - own_first));
  auto* inbox = reinterpret_cast<float4*>(shared + kWarps * WarpRing::kWarpBytes);
  const std::uint32_t barrier = shared_address(&received);
  const int row_pairs = (rows + 1) / 2;
  if (thread == 0) {
    expect_bytes(barrier, active * (own_quads + row_pairs) * 16);
  }
  for (int i = thread; i < rows * quads; i += kThreads) {
    const int row = i / quads;
    send_to_cluster(shared_address(&inbox[rank * share + i % share]),
                    merged_quad(row, i % quads, merged_reference(row)), barrier, i / share);
  }
  for (int i = thread; i < row_pairs * active; i += kThreads) {
    const int pair = i % row_pairs;
    const int second = min(2 * pair + 1, rows - 1);
    const float first_reference = merged_reference(2 * pair);
    const float second_reference = merged_reference(second);
    send_to_cluster(shared_address(&inbox_sums[rank][pair]),
                    {first_reference, merged_sum(2 * pair, first_reference), second_reference,
                     merged_sum(second, second_reference)},
                    barrier, i / row_pairs);
  }
  wait_barrier(barrier, 0);
  for (int i = thread; i < own_quads; i += kThreads) {
    const int row = (own_first + i) / quads;
    const auto sums_of = [&](int from) {
      return reinterpret_cast<const float2*>(inbox_sums[from])[row];
    };
    float top = kNoKeys;
    for (int from = 0; from < active; ++from) {
      top = fmaxf(top, sums_of(from).x);
    }
    float total = 0.0F;
    float4 sum{};
    for (int from = 0; from < active; ++from) {
      const float2 part = sums_of(from);
      const float factor = fast_exp2(part.x - top);
      total = fmaf(part.y, factor, total);
      add_scaled(sum, inbox[from * share + i], factor);
    }
    store(row, (own_first + i) % quads, scaled(sum, 1.0F / total));
  }
#endif
}

// --------------------------------------------------------------------------------------- launchers

/// Rows of tensor-core products that a (sequence, kv head) has at most.
std::int64_t most_rows(const DeviceAttentionArgs& args) {
  return args.max_tokens * (args.num_heads / args.num_kv_heads);
}

template <bool kInt8, int kDim>
std::size_t shared_bytes(const DeviceAttentionArgs& args, int split) {
  const auto rows = static_cast<int>(std::min<std::int64_t>(most_rows(args), kRowsOfTile));
  const int inbox = split == 1 ? 0 : inbox_quads(rows, static_cast<int>(args.head_dim), split) * 16;
  return static_cast<std::size_t>(kWarps * Ring<kInt8, kDim>::kWarpBytes + inbox);
}

/// Blocks that share the keys of a (sequence, kv head, tile of rows), of which there are `works`:
/// the fewest that give every multiprocessor a block and half of them a second.
int split_of(std::int64_t works) {
  const std::int64_t enough = device_limits().multiprocessors * 3 / 2;
  int split = 1;
  while (split < kMaxSplit && works * split < enough) {
    split *= 2;
  }
  return split;
}

template <bool kBFloat16, bool kInt8, int kDim>
void launch_split(const DeviceAttentionArgs& args, cudaStream_t stream) {
  const auto kernel = split_kernel<kBFloat16, kInt8, kDim>;
  const std::int64_t row_tiles = (most_rows(args) + kRowsOfTile - 1) / kRowsOfTile;
  const std::int64_t works = args.num_sequences * args.num_kv_heads * row_tiles;
  const bool clusters = architecture_of(kernel) >= 90;
  MOQ_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes<kInt8, kDim>(args, kMaxSplit))));
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
  int split = clusters ? split_of(works) : 1;
  if (split > kUsualSplit) {
    MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    configure(split);
    if (active_clusters(kernel, config) == 0) {
      split = kUsualSplit;
    }
  }
  configure(split);
  config.gridDim = dim3(static_cast<unsigned>(works * split));
  config.numAttrs = !clusters ? 0 : kernels_may_overlap() ? 2 : 1;
  MOQ_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args, static_cast<int>(row_tiles), split));
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
  const auto limit = static_cast<std::size_t>(device_limits().shared_bytes_per_multiprocessor);
  return suits_tensor_cores(args) && (args.max_tokens == 1 || most_rows(args) <= kRowsOfTile) &&
         (args.head_dim <= 128 || shared_bytes<false, 256>(args, kMaxSplit) + (4 << 10) <= limit);
}

void split_attention(const DeviceAttentionArgs& args, cudaStream_t stream) {
  args.dtype == DType::kBFloat16 ? launch_split<true>(args, stream)
                                 : launch_split<false>(args, stream);
}

}  // namespace moq::kernels::cuda
