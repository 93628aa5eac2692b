// The projection to q, k and v and attention over them in one kernel, for short sequences (compute
// capability 9.0, sm_90a): the projection is in qkv_attention_tile.h, attention in
// qkv_attention_keys.h, here is what surrounds them.
//
// A cluster of thread blocks computes a head of a sequence. Each block multiplies 64 rows of the
// weight (the head's of q, k or v) by 64 tokens, as wgmma_linear does. Those with keys and values
// send them to those with queries, which attend to them as flash_attention does.
//
// Where a multiprocessor has but one block with much to do, two warpgroups take half of the columns
// each, and then half of the keys.
#include "kernels/qkv_attention.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernels/common/check.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/qkv_attention_keys.h"
#include "kernels/cuda/qkv_attention_tile.h"

namespace moq::kernels::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    qkv_attention_kernel(const __grid_constant__ WgmmaMaps maps,
                         const __grid_constant__ HeadArgs args,
                         const __grid_constant__ DeviceLayout layout) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Element = typename ElementOf<T::kBFloat16>::Type;
  extern __shared__ __align__(1024) std::uint8_t shared[];
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / kWarpSize, 0);
  const int rank = static_cast<int>(cluster_rank());
  const int kind = rank / args.token_tiles;  // q, k or v
  const int tile = rank % args.token_tiles;
  const int head = static_cast<int>(cluster_index()) % args.num_heads;
  const WgmmaRing<T> ring{shared_address(shared)};
  const std::uint32_t received = ring.received(0);  // keys and values
  if (threadIdx.x == 0) {
    ring.init();
  }
  __syncthreads();
  arrive_at_cluster();
  allow_next_kernel();
  if (!args.past_is_ready) {
    wait_for_previous_kernels();
  }
  const DeviceSequence sequence =
      args.sequences[static_cast<int>(cluster_index()) / args.num_heads];
  const int tiles = (sequence.num_tokens + kHeadTokens - 1) / kHeadTokens;
  const int row_block = (kind * args.num_heads + head) * T::kRowBlocks;

  if (warp == T::kConsumerThreads / kWarpSize) {
    if (tile < tiles && threadIdx.x % kWarpSize == 0) {
      fetch_in_turn(WgmmaProducer<T>{ring, maps, layout, args.token_bytes},
                    {row_block, sequence.token_begin + tile * kHeadTokens}, args);
    } else {
      wait_for_previous_kernels();  // the next kernel relies on this one not to end before them
    }
    __syncwarp();
    wait_for_cluster();
    return;
  }
  if (tile >= tiles) {
    wait_for_previous_kernels();
    wait_for_cluster();
    return;
  }
  if (!args.weight_is_ready) {
    wait_for_previous_kernels();  // (else only the weight and the bias are read until the next)
  }
  if (kind == 0 && threadIdx.x == 0) {
    expect_bytes(received, 2 * tiles * kHeadTokens * kHeadDim * static_cast<int>(sizeof(Element)));
  }
  const int group = warp / 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int own_block = row_block + warp % 4;
  Grids grids{{1.0F, 1.0F}, {}};
  if constexpr (T::kElementBytes == 1) {
    grids = load_grids<T::kBFloat16>(args.weight, layout, own_block, 0, lane / 4);
  }
  float2 bias{};
  if (args.bias != nullptr) {
    const auto* own = static_cast<const Element*>(args.bias) + own_block * kBlockRows + lane / 4;
    bias = {to_float(own[0]), to_float(own[8])};
  }
  WgmmaSums<T> sums;
  begin_in_turn<T>(ring, group, args.steps, grids.zero, sums);
  wait_for_previous_kernels();
  multiply_in_turn<T>(shared, ring, group, args.steps, grids.zero, sums);
  if (group == 0) {
    // The first stage has been read, and becomes the block's own q, k or v.
    store_tile<T>(ring.base, sums, {grids.scale[0], grids.scale[1]}, bias);
  }
  meet<T::kConsumerThreads>(kAllBarrier);
  wait_for_cluster();  // the barriers of all blocks have been made
  const std::uint32_t keys = ring.base + T::kKeysOffset;
  if (kind > 0) {
    const std::uint32_t target = keys + (2 * tile + kind - 1) * kTileBytes;
    each_piece<kHeadTokens, kHeadDim / 8, T::kConsumerThreads>(
        static_cast<int>(threadIdx.x), [&](int row, int chunk) {
          const int offset = row * kTokenRowBytes + chunk * 16;
          // What stands for tokens behind the sequence must be a number, for it is multiplied by 0.
          float4 piece{};
          if (tile * kHeadTokens + row < sequence.num_tokens) {
            piece = *reinterpret_cast<const float4*>(shared + offset);
          }
          for (int block = 0; block < tiles; ++block) {
            send_to_cluster(target + offset, piece, received, block);
          }
        });
    return;
  }
  if (group * kHeadTokens >= sequence.num_tokens) {
    return;  // there are no keys for it
  }
  wait_barrier(received, 0);
  attend_to_keys<T>(args, sequence, group, head, tile * kHeadTokens, shared, keys);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "compute capability 9.0 is built as 90a"
#endif
}

// --------------------------------------------------------------------------------------- launchers

std::int64_t token_tiles_of(const DeviceAttentionArgs& attention) {
  return (attention.max_tokens + kHeadTokens - 1) / kHeadTokens;
}

std::int64_t clusters_of(const DeviceAttentionArgs& attention) {
  return attention.num_heads * attention.num_sequences;
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

/// Whether results are q, k and v as they are, and attention reads them so.
bool has_nothing_between(const DeviceLinearArgs& projection, const DeviceAttentionArgs& attention) {
  return projection.activation == Activation::kNone && projection.residual == nullptr &&
         projection.row_scales == nullptr && !projection.gated && !projection.float32_output &&
         projection.qkv.rotary.rotary_dim == 0 && projection.qkv.pages.keys == nullptr &&
         attention.pages.keys == nullptr && attention.dtype == projection.dtype;
}

bool has_such_heads(const DeviceLayout& layout, const DeviceAttentionArgs& attention) {
  return attention.head_dim == kHeadDim && attention.num_heads >= 1 &&
         attention.num_heads == attention.num_kv_heads &&
         layout.n == kKinds * attention.num_heads * kHeadDim && attention.max_tokens >= 1 &&
         attention.max_tokens <= kMostTokenTiles * kHeadTokens;
}

/// A launch of one cluster.
template <typename T>
class ClusterLaunch {
 public:
  explicit ClusterLaunch(const DeviceAttentionArgs& attention) {
    MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        T::kBlockShared));
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim = {static_cast<unsigned>(kKinds * token_tiles_of(attention)), 1,
                                     1};
    attributes_[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = attributes_[0].val.clusterDim.x;
    config.blockDim = dim3(T::kThreads);
    config.dynamicSmemBytes = T::kBlockShared;
    config.attrs = attributes_;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;

  static auto kernel() { return qkv_attention_kernel<T>; }
  /// Clusters that run at once.
  std::int64_t at_once() const { return active_clusters(kernel(), config); }

  cudaLaunchConfig_t config{};

 private:
  cudaLaunchAttribute attributes_[2] = {};
};

template <typename T>
void launch(const DeviceLinearArgs& projection, const DeviceLayout& layout,
            const DeviceAttentionArgs& attention, cudaStream_t stream) {
  const int box_tokens = static_cast<int>(std::min<std::int64_t>(projection.m, kHeadTokens));
  HeadArgs args{.weight = projection.weight.data,
                .bias = projection.bias,
                .sequences = attention.sequences,
                .alibi_slopes = attention.alibi_slopes,
                .output = attention.output,
                .output_stride = attention.output_stride,
                .next = {},
                .num_heads = static_cast<int>(attention.num_heads),
                .steps = static_cast<int>(pad_to(layout.k, kStepCols) / kStepCols),
                .token_tiles = static_cast<int>(token_tiles_of(attention)),
                .token_bytes = box_tokens * kStepCols * 2,
                .scale = attention.scale,
                .causal = attention.causal,
                .weight_is_ready = projection.weight_is_ready,
                .past_is_ready = attention.past_is_ready};
  ClusterLaunch<T> cluster(attention);
  (void)required_clusters(cluster.kernel(), cluster.config);
  cluster.config.gridDim.x *= static_cast<unsigned>(clusters_of(attention));
  args.next = next_weight_of(projection, cluster.config.gridDim.x);
  cluster.config.stream = stream;
  cluster.config.numAttrs = kernels_may_overlap() ? 2 : 1;
  const WgmmaMaps maps = wgmma_maps(
      projection, layout, {.tokens = box_tokens, .row_blocks = T::kRowBlocks, .groups = 1});
  launch_kernel(cluster.config, cluster.kernel(), maps, args, layout);
}

/// use<T>() for the kernel of such weights and activations.
template <int kWarpgroups, typename Use>
auto with_tile(const DeviceLinearArgs& projection, const DeviceLayout& layout, const Use& use) {
  const auto with_bytes = [&]<int kElementBytes>() {
    return projection.dtype == DType::kBFloat16
               ? use.template operator()<HeadTile<true, kElementBytes, kWarpgroups>>()
               : use.template operator()<HeadTile<false, kElementBytes, kWarpgroups>>();
  };
  return layout.element_bytes == 2 ? with_bytes.template operator()<2>()
                                   : with_bytes.template operator()<1>();
}

template <int kWarpgroups>
bool runs_at_once(const DeviceLinearArgs& projection, const DeviceLayout& layout,
                  const DeviceAttentionArgs& attention) {
  return clusters_of(attention) <= with_tile<kWarpgroups>(projection, layout, [&]<typename T>() {
           return ClusterLaunch<T>(attention).at_once();
         });
}

}  // namespace

bool qkv_attention_halves(const DeviceLinearArgs& projection,
                          const DeviceAttentionArgs& attention) {
  // Measured on an H100 between the other kernels of BERT: with fewer columns or one tile of keys
  // the second warpgroup costs more than it saves, for the next kernel finds less room to begin.
  constexpr std::int64_t kLeastColumns = 961;
  return projection.weight.shape.k >= kLeastColumns && token_tiles_of(attention) > 1 &&
         runs_at_once<2>(projection, device_layout(projection.weight.shape), attention);
}

bool prefers_qkv_attention(const DeviceLinearArgs& projection,
                           const DeviceAttentionArgs& attention) {
  constexpr std::int64_t kLeastTokens = 9;
  const DeviceLayout layout = device_layout(projection.weight.shape);
  return attention.max_tokens >= kLeastTokens && has_such_heads(layout, attention) &&
         has_nothing_between(projection, attention) && layout.groups <= 1 &&
         is_aligned(attention.output) && attention.output_stride % 8 == 0 &&
         can_wgmma(projection, layout) && runs_at_once<1>(projection, layout, attention);
}

void qkv_attention(const DeviceLinearArgs& projection, const DeviceAttentionArgs& attention,
                   cudaStream_t stream) {
  const DeviceLayout layout = device_layout(projection.weight.shape);
  if (projection.m == 0 || attention.num_sequences == 0 || attention.max_tokens == 0) {
    return;
  }
  MOQ_CHECK(projection.input != nullptr, "qkv_attention: projection.input must not be null");
  MOQ_CHECK(projection.weight.data != nullptr &&
                reinterpret_cast<std::uintptr_t>(projection.weight.data) % kPackedAlignment == 0,
            "qkv_attention: a packed weight must be aligned to ", kPackedAlignment, " bytes, got ",
            projection.weight.data);
  MOQ_CHECK(attention.output != nullptr, "qkv_attention: attention.output must not be null");
  MOQ_CHECK(attention.sequences != nullptr, "qkv_attention: attention.sequences must not be null");
  MOQ_CHECK(attention.scale > 0.0F, "qkv_attention: attention.scale must be > 0, got ",
            attention.scale);
  MOQ_CHECK(has_such_heads(layout, attention),
            "qkv_attention: heads must be of 64 dimensions with keys of their own, sequences of at "
            "most ",
            kMostTokenTiles * kHeadTokens, " tokens, got ", attention.num_heads, " heads of ",
            attention.head_dim, " dimensions, ", attention.num_kv_heads, " of keys, ",
            attention.max_tokens, " tokens and a weight of ", layout.n, " rows");
  MOQ_CHECK(
      has_nothing_between(projection, attention),
      "qkv_attention: q, k and v must be the projection's results as they are, of "
      "attention's dtype: no activation, residual, row_scales, gate, float32_output, rotation "
      "or cache");
  MOQ_CHECK(projection.m == 1 || projection.input_stride >= layout.k,
            "qkv_attention: projection.input_stride must be >= k, got ", projection.input_stride,
            " and ", layout.k);
  MOQ_CHECK(attention.output_stride >= attention.num_heads * kHeadDim &&
                attention.output_stride % 8 == 0 && is_aligned(attention.output),
            "qkv_attention: attention.output_stride must be a multiple of 8 and >= ",
            attention.num_heads * kHeadDim, ", the output aligned to 16 bytes, got ",
            attention.output_stride, " and ", attention.output);
  MOQ_CHECK(
      layout.groups <= 1 && can_wgmma(projection, layout),
      "qkv_attention: needs compute capability 9.0, 16-bit activations whose rows are aligned "
      "to 16 bytes, no norm, and a weight of integers with one scale a row or of the "
      "activations' dtype, got ",
      name_of(projection.dtype), " and ", name_of(projection.weight.shape.format));
  const auto start = [&]<typename T>() { launch<T>(projection, layout, attention, stream); };
  qkv_attention_halves(projection, attention) ? with_tile<2>(projection, layout, start)
                                              : with_tile<1>(projection, layout, start);
}

}  // namespace moq::kernels::cuda
