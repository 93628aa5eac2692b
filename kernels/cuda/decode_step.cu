// A decode step as one kernel that stays on all multiprocessors: what a chain of kernels spends on
// beginning and ending five times a layer goes to exchanges of a few kilobytes instead
// (decode_step_exchange.h). Weights and keys stream through shared memory (decode_step_stream.h)
// while the warps that multiply (decode_step_layer.h) wait for each other.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/decode_step_check.h"
#include "kernels/cuda/decode_step_layer.h"
#include "kernels/cuda/decode_step_plan.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/decode_step.h"

namespace moq::kernels::cuda {
namespace {

using namespace step;

/// kRounds: in which the warps take the column blocks of a row in turn. Element: of activations.
template <int kRounds, typename Element>
__global__ void __launch_bounds__(kThreads, 1)
    decode_step_kernel(const __grid_constant__ Parameters parameters) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::uint8_t dynamic[];
  __shared__ Ring ring;
  __shared__ float2 moments[2][8];
  __shared__ Sources sources;
  auto* const digits = reinterpret_cast<uint4*>(dynamic + kStages * kStageBytes);
  auto* const sums = reinterpret_cast<float*>(digits + kConsumers * kRounds);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared_address(&ring.full[i]));
      init_barrier(shared_address(&ring.empty[i]), kConsumers);
    }
    publish_barriers();
  }
  for (int i = thread; i < 2 * kSumRows * kSumStride; i += kThreads) {
    sums[i] = 0.0F;  // what no warp writes stays 0
  }
  if (thread < 2 * 8) {
    moments[thread / 8][thread % 8] = make_float2(0.0F, 0.0F);
  }
  if (thread < 2 * kProjections) {
    sources.units[thread / 2][thread % 2] =
        parameters.units[thread / 2 * (gridDim.x + 1) + blockIdx.x + thread % 2];
  }
  for (int i = thread; i < parameters.layers * kProjections; i += kThreads) {
    sources.weights[i] = parameters.weights[i];
  }
  const int past = parameters.sequence->past_length;
  const KeySpan keys(static_cast<int>(blockIdx.x), past);
  constexpr int kPage = static_cast<int>(kPageTokens);
  if (const int page = keys.begin / kPage + thread;
      thread < kHeldPages && page * kPage < keys.end) {
    sources.pages[thread] = page_of(parameters, page);
  }
  __syncthreads();
  const std::uint32_t stages = shared_address(dynamic);
  if (thread >= kConsumers) {
    if (thread == kConsumers) {
      Producer(parameters, ring, stages).run(sources, keys);
    }
    return;
  }
  const SharedMemory shared{.ring = &ring,
                            .stages = stages,
                            .digits = digits,
                            .sums = sums,
                            .parts = sums + 2 * kSumRows * kSumStride,
                            .moments = moments,
                            .units = sources.units};
  Layers<kRounds, Element>(parameters, shared, past, *parameters.cache_row).run();
#endif
}

// ---- tables

/// Scale and bias of one projection's rows.
template <typename Element>
__global__ void pack_rows(const float* scales, const Element* bias, int count, float2* rows) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) {
    rows[i] = make_float2(scales[i], bias == nullptr ? 0.0F : number_of(bias[i]));
  }
}

/// Weight and bias of a norm, four of each in turn, in the order of the exchanged words.
__global__ void pack_norm(const float* weight, const float* bias, int hidden, float* norm) {
  const int place = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (place < hidden) {
    const int column = place / kBlockRows * kBlockRows + column_at(place % kBlockRows);
    float* const word = norm + place / 4 * 8 + place % 4;
    word[0] = weight[column];
    word[4] = bias == nullptr ? 0.0F : bias[column];
  }
}

// ---- choice of a kernel

/// Calls use.operator()<kRounds, Element>() with those of a shape; false if there are none.
template <typename Use>
bool with_kernel(std::int64_t num_heads, DType dtype, const Use& use) {
  const auto with_rounds = [&]<int kRounds>() {
    if (dtype == DType::kFloat16) {
      use.template operator()<kRounds, Float16>();
    } else {
      use.template operator()<kRounds, BFloat16>();
    }
    return true;
  };
  if (num_heads < 1 || num_heads > kMaxHeads ||
      (dtype != DType::kFloat16 && dtype != DType::kBFloat16)) {
    return false;
  }
  switch (rounds_of(num_heads)) {
    case 1:
      return with_rounds.template operator()<1>();
    case 2:
      return with_rounds.template operator()<2>();
    case 3:
      return with_rounds.template operator()<3>();
    case 4:
      return with_rounds.template operator()<4>();
    case 5:
      return with_rounds.template operator()<5>();
    case 6:
      return with_rounds.template operator()<6>();
    case 7:
      return with_rounds.template operator()<7>();
    case 8:
      return with_rounds.template operator()<8>();
    default:
      return false;
  }
}

std::size_t shared_bytes(int rounds) {
  return kStages * kStageBytes + sizeof(uint4) * kConsumers * static_cast<std::size_t>(rounds) +
         sizeof(float) * (2 * kSumRows * kSumStride + kWarps * kPartStride);
}

/// Where the parts of a state lie, in bytes.
struct State {
  std::size_t layers_done = 0;
  std::size_t units;
  std::size_t weights;
  std::size_t rows;
  std::size_t norms;
  std::size_t exchange;
  std::size_t exchange_bytes = 0;
  std::size_t end;

  State(const DecodeStepShape& shape, int grid) {
    constexpr std::size_t kAlignment = 128;
    const auto layers = static_cast<std::size_t>(shape.num_layers);
    const auto hidden = static_cast<std::size_t>(shape.hidden_size);
    end = kAlignment;
    const auto place = [&](std::size_t bytes) {
      const std::size_t begin = end;
      end += (bytes + kAlignment - 1) / kAlignment * kAlignment;
      return begin;
    };
    with_kernel(shape.num_heads, shape.dtype, [&]<int kRounds, typename Element>() {
      exchange_bytes = std::size_t{kCopies} * Slot<kRounds>::kCopyBytes;
    });
    units = place(kProjections * static_cast<std::size_t>(grid + 1) * sizeof(std::int16_t));
    weights = place(layers * kProjections * sizeof(void*));
    rows = place(layers * kLayerRows * hidden * sizeof(float2));
    norms = place(layers * 4 * hidden * sizeof(float));
    exchange = place(exchange_bytes);
  }
};

int step_grid(const DecodeStepShape& shape) {
  return grid_of(shape.num_heads, device_limits().multiprocessors);
}

void check_shape(const DecodeStepShape& shape) {
  MOQ_CHECK(decode_step_supports(shape),
            "decode_step: the shape must be one that decode_step_supports, got ", shape.num_layers,
            " layers of ", shape.num_heads, " heads of ", shape.head_dim, ", hidden size ",
            shape.hidden_size, ", feed-forward ", shape.intermediate_size, ", ",
            name_of(shape.dtype), ": other decoders take a kernel for each projection");
}

/// A kernel that may have as much shared memory as it takes, on the current device.
template <int kRounds, typename Element>
auto ready_kernel() {
  const auto kernel = decode_step_kernel<kRounds, Element>;
  MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes(kRounds))));
  return kernel;
}

/// Whether a multiprocessor holds a thread block of a kernel.
template <int kRounds, typename Element>
bool fits() {
  int blocks = 0;
  MOQ_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, ready_kernel<kRounds, Element>(), kThreads, shared_bytes(kRounds)));
  return blocks > 0;
}

}  // namespace

bool decode_step_supports(const DecodeStepShape& shape) {
  if (shape.num_layers < 1 || shape.num_layers > kMaxLayers || shape.head_dim != kHeadDim ||
      shape.num_heads < 1 || shape.num_heads > kMaxHeads ||
      shape.hidden_size != shape.num_heads * kHeadDim ||
      shape.intermediate_size != kPieces * shape.hidden_size || step_grid(shape) == 0) {
    return false;
  }
  bool runs = false;
  with_kernel(shape.num_heads, shape.dtype, [&]<int kRounds, typename Element>() {
    runs = architecture_of(decode_step_kernel<kRounds, Element>) >= 90 && fits<kRounds, Element>();
  });
  return runs;
}

bool decode_step_supports(const DecodeStepShape& shape, const DecodeStepLayer& layer) {
  return decode_step_supports(shape) && obstacle_in(shape, layer).empty();
}

std::size_t decode_step_state_size(const DecodeStepShape& shape) {
  check_shape(shape);
  return State(shape, step_grid(shape)).end;
}

void prepare_decode_step(const DecodeStepShape& shape, std::span<const DecodeStepLayer> layers,
                         void* state, cudaStream_t stream) {
  constexpr int kBlock = 256;
  check_shape(shape);
  MOQ_CHECK(static_cast<std::int64_t>(layers.size()) == shape.num_layers,
            "decode_step: there must be ", shape.num_layers, " layers, got ", layers.size());
  MOQ_CHECK(state != nullptr && reinterpret_cast<std::uintptr_t>(state) % kPackedAlignment == 0,
            "decode_step: state must be aligned to ", kPackedAlignment, " bytes, got ", state);
  const int grid = step_grid(shape);
  const State places(shape, grid);
  auto* const base = static_cast<char*>(state);
  const auto blocks = [](std::int64_t items) {
    return static_cast<unsigned>((items + kBlock - 1) / kBlock);
  };
  const int hidden = static_cast<int>(shape.hidden_size);
  std::vector<const void*> weights;
  auto* rows = reinterpret_cast<float2*>(base + places.rows);
  auto* norms = reinterpret_cast<float*>(base + places.norms);
  for (const DecodeStepLayer& layer : layers) {
    const std::size_t index = weights.size() / kProjections;
    const std::string found = obstacle_in(shape, layer);
    MOQ_CHECK(found.empty(), "decode_step: layer ", index,
              " must be of LayerNorms and INT8 weights with one scale a row, got ", found);
    const std::array<std::pair<const PackedLinear*, const void*>, kProjections> projections{
        {{&layer.qkv, layer.qkv_bias},
         {&layer.attention_out, layer.attention_out_bias},
         {&layer.up, layer.up_bias},
         {&layer.down, layer.down_bias}}};
    for (const auto& [weight, bias] : projections) {
      MOQ_CHECK(weight->data != nullptr &&
                    reinterpret_cast<std::uintptr_t>(weight->data) % kPackedAlignment == 0,
                "decode_step: weights must be aligned to ", kPackedAlignment, " bytes, got ",
                weight->data, " in layer ", index);
      weights.push_back(weight->data);
      const DeviceLayout layout = device_layout(weight->shape);
      const auto* const scales = reinterpret_cast<const float*>(
          static_cast<const char*>(weight->data) + layout.scales_offset);
      const int count = static_cast<int>(layout.n);
      if (shape.dtype == DType::kFloat16) {
        launch_in_order(pack_rows<Float16>, blocks(count), kBlock, stream, scales,
                        static_cast<const Float16*>(bias), count, rows);
      } else {
        launch_in_order(pack_rows<BFloat16>, blocks(count), kBlock, stream, scales,
                        static_cast<const BFloat16*>(bias), count, rows);
      }
      rows += count;
    }
    for (const DeviceNorm* norm : {&layer.attention_norm, &layer.ffn_norm}) {
      MOQ_CHECK(norm->weight != nullptr, "decode_step: norms must have weights, got null in layer ",
                index);
      launch_in_order(pack_norm, blocks(hidden), kBlock, stream, norm->weight, norm->bias, hidden,
                      norms);
      norms += 2 * hidden;
    }
  }
  const Units units = units_of(shape.num_heads, grid);
  MOQ_CUDA_CHECK(cudaMemcpyAsync(base + places.units, units.data(),
                                 units.size() * sizeof(std::int16_t), cudaMemcpyHostToDevice,
                                 stream));
  MOQ_CUDA_CHECK(cudaMemcpyAsync(base + places.weights, weights.data(),
                                 weights.size() * sizeof(void*), cudaMemcpyHostToDevice, stream));
  MOQ_CUDA_CHECK(cudaMemsetAsync(base, 0, sizeof(std::uint32_t), stream));
  MOQ_CUDA_CHECK(cudaMemsetAsync(base + places.exchange, 0xff, places.exchange_bytes, stream));
  MOQ_CUDA_CHECK(cudaStreamSynchronize(stream));
}

void decode_step(const DecodeStepArgs& args, cudaStream_t stream) {
  const DecodeStepShape& shape = args.shape;
  check_shape(shape);
  const int grid = step_grid(shape);
  const State places(shape, grid);
  check_args(args, places.end);
  auto* const base = static_cast<char*>(args.state);
  const Parameters parameters{
      .weights = reinterpret_cast<const std::uint8_t* const*>(base + places.weights),
      .rows = reinterpret_cast<const float2*>(base + places.rows),
      .norms = reinterpret_cast<const float4*>(base + places.norms),
      .units = reinterpret_cast<const std::int16_t*>(base + places.units),
      .exchange = base + places.exchange,
      .layers_done = reinterpret_cast<std::uint32_t*>(base + places.layers_done),
      .input = static_cast<const std::uint16_t*>(args.input),
      .output = static_cast<std::uint16_t*>(args.output),
      .keys = static_cast<std::uint16_t*>(args.pages.keys),
      .values = static_cast<std::uint16_t*>(args.pages.values),
      .cache_stride = args.layer_stride,
      .page_table = args.page_table,
      .page_table_stride = args.page_table_stride,
      .sequence = args.sequence,
      .cache_row = args.cache_row,
      .layers = static_cast<std::int32_t>(shape.num_layers),
      .hidden = static_cast<std::int32_t>(shape.hidden_size),
      .heads = static_cast<std::int32_t>(shape.num_heads),
      .col_blocks = static_cast<std::int32_t>(shape.hidden_size / kBlockCols),
      .inverse_hidden = 1.0F / static_cast<float>(shape.hidden_size),
      .activation = shape.activation,
      .epsilon = shape.norm_epsilon};
  with_kernel(shape.num_heads, shape.dtype, [&]<int kRounds, typename Element>() {
    // Cooperative: the driver starts all thread blocks together or none, so that none waits for
    // one that another stream's kernel keeps out.
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes(kRounds);
    config.stream = stream;
    config.attrs = &together;
    config.numAttrs = 1;
    launch_kernel(config, ready_kernel<kRounds, Element>(), parameters);
  });
}

}  // namespace moq::kernels::cuda
