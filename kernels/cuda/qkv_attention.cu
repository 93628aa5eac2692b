// The projection to q, k and v and attention over them in one kernel, for short sequences (compute
// capability 9.0, sm_90a).
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
#include <numbers>

#include "kernels/common/check.h"
#include "kernels/cuda/attention_products.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/linear_wgmma_sums.h"
#include "kernels/cuda/linear_wgmma_tile.h"
#include "kernels/cuda/vectors.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kHeadDim = 64;  // a tile's rows
constexpr int kHeadTokens = 64;
constexpr int kMostTokenTiles = 2;  // of a sequence
constexpr int kKinds = 3;           // q, k, v
constexpr int kTokenRowBytes = kQueryRowBytes<kHeadDim>;
static_assert(kTokenRowBytes == TileLayout<false, kHeadDim>::kRowBytes);
constexpr int kTileBytes = kHeadTokens * kTokenRowBytes;  // q, k or v of a tile's tokens

/// A tile of wgmma_linear, with room for the keys and values of a sequence.
template <bool kBFloat16, int kElementBytes, int kWarpgroups_>
struct HeadTile
    : WgmmaTileOf<kBFloat16, kElementBytes, false, WgmmaArrangement<1, kHeadTokens, false>> {
  using Base =
      WgmmaTileOf<kBFloat16, kElementBytes, false, WgmmaArrangement<1, kHeadTokens, false>>;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kInterleave = kWarpgroups;
  static constexpr int kConsumerThreads = kWarpgroups * kWarpgroup;
  static constexpr int kThreads = kConsumerThreads + kWarpSize;
  static constexpr int kBlocks = kWarpgroups == 1 ? 2 : 1;  // of a multiprocessor
  static constexpr int kKeyBytes = kMostTokenTiles * 2 * kTileBytes;
  // Half of a multiprocessor: beside one block there is room for one of the next kernel.
  static constexpr int kRoom = kSharedBytes / 2 - kReservedBytes - kKeyBytes - Base::kBarrierBytes;
  static constexpr int kStages =
      std::min(kRoom / Base::kStageBytes, kMaxStages) / kInterleave * kInterleave;
  static constexpr int kKeysOffset = kStages * Base::kStageBytes;
  static constexpr int kBarriersOffset = kKeysOffset + kKeyBytes;
  static constexpr int kBlockShared = kBarriersOffset + Base::kBarrierBytes;
  static_assert(kStages >= 3 && kTileBytes <= Base::kStageBytes);

  /// What the second warpgroup hands to the first, four numbers a thread and row, lies in stages
  /// that only the second reads: every second one, from the second on.
  static constexpr int kHandedRowBytes = kWarpgroup * 16;
  static constexpr int kHandedRowsOfStage = Base::kStageBytes / kHandedRowBytes;
  static constexpr int kHandedRows = kHeadTokens / 2 / 4 + 1;
  static_assert(kWarpgroups == 1 || kStages / 2 * kHandedRowsOfStage >= kHandedRows);
};

/// What the kernel gets besides tensor maps and the weight's layout. Plain data.
struct HeadArgs {
  const void* weight;
  const void* bias;
  const DeviceSequence* sequences;
  const float* alibi_slopes;
  void* output;
  std::int64_t output_stride;
  NextWeight next;
  int num_heads;
  int steps;        ///< of kStepCols columns
  int token_tiles;  ///< of the longest sequence
  int token_bytes;  ///< of a step
  float scale;
  bool causal;
  bool weight_is_ready;
  bool past_is_ready;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Numbers of barriers: of each warpgroup, and of both.
constexpr int kFirstBarrier = 1;
constexpr int kSecondBarrier = 2;
constexpr int kAllBarrier = 3;

/// Four numbers of this thread of a warpgroup, in row i of what the second hands to the first.
template <typename T>
__device__ __forceinline__ float4* handed(std::uint8_t* ring, int i) {
  const int stage = 1 + i / T::kHandedRowsOfStage * 2;
  return reinterpret_cast<float4*>(ring + stage * T::kStageBytes +
                                   i % T::kHandedRowsOfStage * T::kHandedRowBytes) +
         threadIdx.x % kWarpgroup;
}

/// Fetches the steps of the warpgroups in turn: those of a later one are behind all of an earlier.
template <typename T>
__device__ __forceinline__ void fetch(const WgmmaProducer<T>& producer, const WgmmaPlace& place,
                                      const HeadArgs& args) {
  constexpr int kTurns = T::kWarpgroups;
  const int steps = args.steps;
  const int rounds = (steps + kTurns - 1) / kTurns;  // of the last one, which has the most
  const auto step_of = [&](int i) {
    const int group = i % kTurns;
    const int step = steps * group / kTurns + i / kTurns;
    return step < steps * (group + 1) / kTurns ? step : -1;
  };
  prefetch_map(producer.maps.tokens);
  const int early = args.weight_is_ready ? min(rounds * kTurns, T::kStages) : 0;
  for (int i = 0; i < early; ++i) {
    if (step_of(i) >= 0) {
      producer.fetch_weights(place, step_of(i), i);
    }
  }
  bring(args.next);
  wait_for_previous_kernels();
  std::uint32_t stage = 0;
  std::uint32_t parity = 0;
  for (int i = 0; i < rounds * kTurns; ++i) {
    if (const int step = step_of(i); step >= 0) {
      if (i >= early) {
        wait_barrier(producer.ring.empty(stage), parity ^ 1);
        producer.fetch_weights(place, step, stage);
      }
      producer.fetch_tokens(place, step, stage);
    }
    if (++stage == T::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

/// Multiplies the columns of this warpgroup, and adds what the second has to the first's sums.
template <typename T>
__device__ __forceinline__ void multiply(std::uint8_t* shared, const WgmmaRing<T>& ring, int group,
                                         int steps, const std::uint32_t (&zero)[2],
                                         WgmmaSums<T>& sums) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
  const int own_steps = steps * (group + 1) / T::kWarpgroups - steps * group / T::kWarpgroups;
  if (own_steps > 0) {
    WgmmaSlot<T> slot{.stage = static_cast<std::uint32_t>(group)};
    sums.multiply(ring, slot, own_steps, warp, zero);
  } else {
#pragma unroll
    for (float& sum : sums.sums) {
      sum = 0.0F;
    }
  }
  // The stages have been read. (By a number known only at run time, all 16 barriers would be
  // taken.)
  group == 0 ? meet<kWarpgroup>(kFirstBarrier) : meet<kWarpgroup>(kSecondBarrier);
  if constexpr (T::kWarpgroups == 2) {
    constexpr int kQuads = kHeadTokens / 2 / 4;
    if (group == 1) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        *handed<T>(shared, i) = float4{sums.sums[4 * i], sums.sums[4 * i + 1], sums.sums[4 * i + 2],
                                       sums.sums[4 * i + 3]};
      }
    }
    meet<T::kConsumerThreads>(kAllBarrier);
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        const float4 other = *handed<T>(shared, i);
        sums.sums[4 * i] += other.x;
        sums.sums[4 * i + 1] += other.y;
        sums.sums[4 * i + 2] += other.z;
        sums.sums[4 * i + 3] += other.w;
      }
    }
  }
}

/// Sums of 64 rows and tokens, scaled and rounded, to shared memory: [token][row].
template <typename T>
__device__ __forceinline__ void store_tile(std::uint32_t tile, const WgmmaSums<T>& sums,
                                           const float2& scale, const float2& bias) {
  using Element = typename ElementOf<T::kBFloat16>::Type;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  // The lane's row of four matrices: 0 and 1 are rows 0 to 7 and 8 to 15 of eight tokens, 2 and 3
  // of the eight behind.
  const std::uint32_t own =
      tile + (lane / 16 * 8 + lane % 8) * kTokenRowBytes + (warp * 2 + lane / 8 % 2) * 16;
#pragma unroll
  for (int i = 0; i < kHeadTokens / 16; ++i) {
    std::uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float factor = w % 2 == 0 ? scale.x : scale.y;
      const float added = w % 2 == 0 ? bias.x : bias.y;
      words[w] = rounded_pair<Element>(sums.sums[8 * i + 2 * w] * factor + added,
                                       sums.sums[8 * i + 2 * w + 1] * factor + added);
    }
    store_transposed(own + i * 16 * kTokenRowBytes, words);
  }
}

/// A warp's rows, and what their keys have brought so far.
struct Attended {
  Softmax<1> softmax;
  float output[1][kHeadDim / 8][4] = {};
};

/// The second warpgroup's part, whose keys are others.
template <typename T>
__device__ __forceinline__ void hand_over(std::uint8_t* shared, const Attended& own) {
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    *handed<T>(shared, n) =
        float4{own.output[0][n][0], own.output[0][n][1], own.output[0][n][2], own.output[0][n][3]};
  }
  *handed<T>(shared, kHeadDim / 8) = float4{own.softmax.largest[0][0], own.softmax.largest[0][1],
                                            own.softmax.sum[0][0], own.softmax.sum[0][1]};
}

template <typename T>
__device__ __forceinline__ void take_over(std::uint8_t* shared, float scale, Attended& own) {
  const float4 state = *handed<T>(shared, kHeadDim / 8);
  const float largest[2] = {state.x, state.y};
  const float sum[2] = {state.z, state.w};
  float keep[2];
  float add[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& reference = own.softmax.largest[0][half];
    const float top = fmaxf(reference, largest[half]);
    const auto factor = [&](float before) {
      return before == kMinusInfinity
                 ? 0.0F
                 : fast_exp2(reference_of(before, scale) - reference_of(top, scale));
    };
    keep[half] = factor(reference);
    add[half] = factor(largest[half]);
    own.softmax.sum[0][half] = own.softmax.sum[0][half] * keep[half] + sum[half] * add[half];
    reference = top;
  }
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    const float4 other = *handed<T>(shared, n);
    own.output[0][n][0] = own.output[0][n][0] * keep[0] + other.x * add[0];
    own.output[0][n][1] = own.output[0][n][1] * keep[0] + other.y * add[0];
    own.output[0][n][2] = own.output[0][n][2] * keep[1] + other.z * add[1];
    own.output[0][n][3] = own.output[0][n][3] * keep[1] + other.w * add[1];
  }
}

/// Attention of the 64 queries in `shared` to the keys and values behind `keys`: a tile of them for
/// each warpgroup, or all for one.
template <typename T>
__device__ __forceinline__ void attend_to_keys(const HeadArgs& args, const DeviceSequence& sequence,
                                               int group, int head, int first_token,
                                               std::uint8_t* shared, std::uint32_t keys) {
  using Element = typename ElementOf<T::kBFloat16>::Type;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_keys = sequence.num_tokens;
  const int warp_token = first_token + warp * kRowsOfTile;  // of the sequence
  std::uint8_t* const rows = shared + warp * kRowsOfTile * kTokenRowBytes;
  const float slope = args.alibi_slopes == nullptr ? 0.0F : args.alibi_slopes[head] / args.scale;
  const auto limit_of = [&](int token) {
    return args.causal ? min(token + 1, num_keys) : num_keys;
  };
  const auto sight = [&](int /*r*/, int half) {
    const int token = warp_token + lane / 4 + 8 * half;
    return Sight{limit_of(token), token, 0, slope};
  };
  // Rows behind the sequence are of the next one. They must not matter to a decision that a warp
  // makes for all its rows.
  const int existing = min(kRowsOfTile, num_keys - warp_token);
  const auto query = [&](int step, std::uint32_t(&a)[1][4]) {
    query_fragments<false, kHeadDim>(shared_address(rows), existing, step, lane, a[0]);
  };
  const int least_limit = limit_of(warp_token);
  const int warp_end = warp_token < num_keys ? limit_of(warp_token + kRowsOfTile - 1) : 0;
  const float scale = args.scale * std::numbers::log2e_v<float>;
  Attended own;
  const int begin = group * kHeadTokens;
  for (int first = begin; first < warp_end; first += T::kWarpgroups * kHeadTokens) {
    attend<T::kBFloat16, false, kHeadDim, kHeadTokens, 1>(
        keys + first / kHeadTokens * 2 * kTileBytes, query, sight, first, first == begin,
        first + kHeadTokens > least_limit, args.alibi_slopes != nullptr, scale, lane, own.softmax,
        own.output);
  }
  if constexpr (T::kWarpgroups == 2) {
    if (num_keys > kHeadTokens) {
      if (group == 1) {
        hand_over<T>(shared, own);
      }
      meet<T::kConsumerThreads>(kAllBarrier);
      if (group == 0) {
        take_over<T>(shared, scale, own);
      }
    }
    if (group == 1) {
      return;
    }
  }
  __syncwarp();
  finish_rows<T::kBFloat16, false, kHeadDim>(rows, lane, own.softmax, own.output);
  __syncwarp();
  each_piece<kRowsOfTile, kHeadDim / 8, kWarpSize>(lane, [&](int row, int chunk) {
    const int token = warp_token + row;
    if (token < num_keys) {
      Element* const place =
          static_cast<Element*>(args.output) +
          (sequence.token_begin + static_cast<std::int64_t>(token)) * args.output_stride +
          head * kHeadDim + chunk * 8;
      *reinterpret_cast<uint4*>(place) =
          *reinterpret_cast<const uint4*>(rows + row * kTokenRowBytes + chunk * 16);
    }
  });
}

#endif

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
    for (int i = 0; i < T::kStages; ++i) {
      init_barrier(ring.full(i), 1);
      init_barrier(ring.empty(i), 4);
    }
    init_barrier(received, 1);
    publish_barriers();
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
      fetch(WgmmaProducer<T>{ring, maps, layout, args.token_bytes},
            {row_block, sequence.token_begin + tile * kHeadTokens}, args);
    } else {
      wait_for_previous_kernels();  // the next kernel relies on this one not to end before them
    }
    __syncwarp();
    wait_for_cluster();
    return;
  }
  wait_for_previous_kernels();
  if (tile >= tiles) {
    wait_for_cluster();
    return;
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
  multiply<T>(shared, ring, group, args.steps, grids.zero, sums);
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
  MOQ_CUDA_CHECK(cudaLaunchKernelEx(&cluster.config, cluster.kernel(), maps, args, layout));
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
