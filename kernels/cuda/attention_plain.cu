// Attention in float32, for every dtype, head and address: the kernel that the others are answers
// to in special cases.
//
// A block takes a head of a token. Its warps take 32 keys at a time: for the scores a lane has a
// key, for the products with the values a lane has dimensions. What the warps have is merged at the
// end, in a fixed order.
#include <cuda_runtime.h>

#include "kernels/common/visit.h"
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kLaneDims = kMaxHeadDim / kWarpSize;
constexpr float kMinusInfinity = -__builtin_huge_valf();

__device__ inline float number(std::int8_t code) {
  return static_cast<float>(code);
}
template <typename Element>
__device__ float number(Element element) {
  return to_float(element);
}

/// Element is the dtype of the activations, Cached that of keys and values.
template <typename Element, typename Cached>
__global__ void __launch_bounds__(kThreads) plain_kernel(DeviceAttentionArgs args) {
  __shared__ float query[kMaxHeadDim];
  __shared__ float outputs[kWarps][kMaxHeadDim];
  __shared__ float tops[kWarps];
  __shared__ float sums[kWarps];
  constexpr bool kCodes = sizeof(Cached) == 1;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize;
  const int lane = thread % kWarpSize;
  allow_next_kernel();
  wait_for_previous_kernels();
  const auto head_dim = static_cast<int>(args.head_dim);
  const auto num_heads = static_cast<int>(args.num_heads);
  const std::int64_t item = blockIdx.x;
  const auto h = static_cast<int>(item % num_heads);
  const auto i = static_cast<int>(item / num_heads % args.max_tokens);
  const DeviceSequence sequence = args.sequences[item / num_heads / args.max_tokens];
  if (i >= sequence.num_tokens) {
    return;
  }
  const bool paged = args.pages.keys != nullptr;
  const std::int64_t kv_head = h / (args.num_heads / args.num_kv_heads);
  const std::int64_t token = sequence.token_begin + static_cast<std::int64_t>(i);
  const int position = (paged ? sequence.past_length : 0) + i;
  const int keys = args.causal ? position + 1 : position - i + sequence.num_tokens;
  for (int d = thread; d < head_dim; d += kThreads) {
    query[d] = to_float(
        static_cast<const Element*>(args.query)[token * args.query_stride + h * head_dim + d]);
  }
  __syncthreads();

  const float slope = args.alibi_slopes == nullptr ? 0.0F : args.alibi_slopes[h];
  float top = kMinusInfinity;
  float sum = 0.0F;
  float output[kLaneDims] = {};
  for (int first = warp * kWarpSize; first < keys; first += kThreads) {
    const Cached* key_rows;
    const Cached* value_rows;
    std::int64_t stride = head_dim;
    std::int64_t row = 0;  // of the step sizes
    if (paged) {
      const std::int64_t page =
          args.page_table[sequence.slot * args.page_table_stride + first / kPageTokens];
      row = (page * args.num_kv_heads + kv_head) * kPageTokens + first % kPageTokens;
      key_rows = static_cast<const Cached*>(args.pages.keys) + row * head_dim;
      value_rows = static_cast<const Cached*>(args.pages.values) + row * head_dim;
    } else {
      stride = args.packed_stride;
      const std::int64_t offset =
          (static_cast<std::int64_t>(sequence.token_begin) + first) * stride + kv_head * head_dim;
      key_rows = static_cast<const Cached*>(args.packed_keys) + offset;
      value_rows = static_cast<const Cached*>(args.packed_values) + offset;
    }
    const bool exists = first + lane < keys;
    float score = kMinusInfinity;
    float value_scale = 0.0F;
    if (exists) {
      const Cached* key = key_rows + lane * stride;
      float dot = 0.0F;
#pragma unroll 4
      for (int d = 0; d < head_dim; ++d) {
        dot = fmaf(query[d], number(key[d]), dot);
      }
      if constexpr (kCodes) {
        dot *= args.pages.key_scales[row + lane];
        value_scale = args.pages.value_scales[row + lane];
      }
      score = dot * args.scale - slope * static_cast<float>(abs(position - first - lane));
    }
    float largest = fmaxf(top, score);
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, offset));
    }
    const float shrink = expf(top - largest);
    top = largest;
    const float probability = exists ? expf(score - top) : 0.0F;
    sum = fmaf(sum, shrink, probability);
    const float factor = kCodes ? probability * value_scale : probability;
#pragma unroll
    for (float& value : output) {
      value *= shrink;
    }
    const int count = min(kWarpSize, keys - first);
    for (int k = 0; k < count; ++k) {
      const float weight = __shfl_sync(0xffffffffU, factor, k);
      const Cached* value = value_rows + k * stride;
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) {
        const int d = lane + j * kWarpSize;
        if (d < head_dim) {
          output[j] = fmaf(weight, number(value[d]), output[j]);
        }
      }
    }
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, offset);
  }
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) {
    outputs[warp][lane + j * kWarpSize] = output[j];
  }
  if (lane == 0) {
    tops[warp] = top;
    sums[warp] = sum;
  }
  __syncthreads();

  float highest = tops[0];
  for (const float other : tops) {
    highest = fmaxf(highest, other);
  }
  float total = 0.0F;
  float factors[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    // (A warp without keys has nothing, however large its factor.)
    factors[w] = tops[w] == kMinusInfinity && sums[w] == 0.0F ? 0.0F : expf(tops[w] - highest);
    total = fmaf(sums[w], factors[w], total);
  }
  auto* target = static_cast<Element*>(args.output) + token * args.output_stride + h * head_dim;
  for (int d = thread; d < head_dim; d += kThreads) {
    float value = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      value = fmaf(outputs[w][d], factors[w], value);
    }
    store_float(target + d, value / total);
  }
}

}  // namespace

void plain_attention(const DeviceAttentionArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.num_sequences * args.max_tokens * args.num_heads));
  const bool codes = args.pages.keys != nullptr && args.pages.dtype == DType::kInt8;
  visit_float(args.dtype, [&]<typename Element>(Element) {
    launch(codes ? plain_kernel<Element, std::int8_t> : plain_kernel<Element, Element>, grid,
           dim3(kThreads), 0, stream, args);
  });
}

}  // namespace moq::kernels::cuda
