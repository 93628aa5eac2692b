// What is left to do with the rows of a QKV projection before attention: heads of q and k are
// normalised and rotated in place, keys and values are appended to the cache.
//
// A warp takes a head of a token and holds it in registers: every element is read and written once.
#include <cuda_runtime.h>

#include "kernels/attention.h"
#include "kernels/common/visit.h"
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.h"
#include "kernels/quant_grid.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 4;

/// Neighbouring elements that a lane reads and writes at once.
template <typename Element, int kRun>
struct alignas(kRun * sizeof(Element)) Run {
  Element element[kRun];
};

__device__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffU, value, offset);
  }
  return value;
}

/// A head in the registers of a warp: run j of a lane begins at element (lane + 32 j) * kRun.
template <int kRun>
struct Head {
  static constexpr int kRuns = kMaxHeadDim / kWarpSize / kRun;
  float value[kRuns][kRun];

  /// visit(value, its place in the head) of the elements that exist.
  template <typename Visitor>
  __device__ void each(int head_dim, const Visitor& visit) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      const int first = (lane + kWarpSize * j) * kRun;
      if (first < head_dim) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          visit(value[j][i], first + i);
        }
      }
    }
  }
  /// visit(run of values, place of its first) of the runs that exist.
  template <typename Visitor>
  __device__ void each_run(int head_dim, const Visitor& visit) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int j = 0; j < kRuns; ++j) {
      const int first = (lane + kWarpSize * j) * kRun;
      if (first < head_dim) {
        visit(value[j], first);
      }
    }
  }
};

template <int kRun>
__device__ void normalise(const DeviceNorm& norm, int head_dim, Head<kRun>& head) {
  const float count = static_cast<float>(head_dim);
  float mean = 0.0F;
  if (norm.kind == NormKind::kLayerNorm) {
    head.each(head_dim, [&](float x, int) { mean += x; });
    mean = warp_sum(mean) / count;
  }
  float squares = 0.0F;
  head.each(head_dim, [&](float x, int) { squares = fmaf(x - mean, x - mean, squares); });
  const float inverse = 1.0F / sqrtf(warp_sum(squares) / count + norm.epsilon);
  head.each(head_dim, [&](float& x, int i) {
    x = (x - mean) * inverse * norm.weight[i];
    if (norm.bias != nullptr) {
      x += norm.bias[i];
    }
  });
}

/// `shared` holds a head, for this warp alone.
template <int kRun>
__device__ void rotate(const DeviceRotary& rotary, std::int64_t token, int head_dim, float* shared,
                       Head<kRun>& head) {
  const int half = rotary.rotary_dim / 2;
  const std::int64_t row = static_cast<std::int64_t>(rotary.positions[token]) * half;
  head.each(head_dim, [&](float x, int i) { shared[i] = x; });
  __syncwarp();
  head.each(head_dim, [&](float& x, int i) {
    if (i < half) {
      x = x * rotary.cos[row + i] - shared[half + i] * rotary.sin[row + i];
    } else if (i < 2 * half) {
      x = x * rotary.cos[row + i - half] + shared[i - half] * rotary.sin[row + i - half];
    }
  });
}

/// The head rounded to 8 bits: codes, and the step size.
template <int kRun>
__device__ void append_codes(std::int8_t* codes, float* scale, int head_dim, Head<kRun>& head) {
  std::int32_t highest = 0;
  head.each(head_dim, [&](float x, int) {
    highest = max(highest, std::bit_cast<std::int32_t>(x) & kMagnitudeMask);
  });
  highest = __reduce_max_sync(0xffffffffU, highest);
  const GridParams grid =
      make_grid(GroupStatistics{0, highest}, 8, QuantMode::kSymmetric, DType::kFloat32);
  const bool has_grid = exists(grid);
  head.each_run(head_dim, [&](const float(&x)[kRun], int first) {
    Run<std::int8_t, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      run.element[i] = static_cast<std::int8_t>(
          has_grid ? quantize_one(x[i], grid, Rounding::kNearest, 0.0F) : 0);
    }
    *reinterpret_cast<Run<std::int8_t, kRun>*>(codes + first) = run;
  });
  if (threadIdx.x % kWarpSize == 0) {
    *scale = grid.scale;
  }
}

/// Heads from first_head on, of num_heads of q and then num_kv_heads each of k and v.
template <typename Element, int kRun>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    append_kv_kernel(DeviceAppendKvArgs args, int first_head) {
  __shared__ float shared[kWarps][kMaxHeadDim];
  allow_next_kernel();
  wait_for_previous_kernels();
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const auto num_heads = static_cast<int>(args.num_heads);
  const auto num_kv_heads = static_cast<int>(args.num_kv_heads);
  const auto head_dim = static_cast<int>(args.head_dim);
  const int heads = num_heads + 2 * num_kv_heads - first_head;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  const std::int64_t token = item / heads;
  if (token >= args.num_tokens) {
    return;
  }
  const int h = first_head + static_cast<int>(item - token * heads);
  const bool is_query = h < num_heads;
  const bool is_key = !is_query && h < num_heads + num_kv_heads;
  const std::int32_t cache_row =
      args.pages.keys == nullptr || is_query ? -1 : args.cache_rows[token];
  const DeviceNorm& norm = is_query ? args.query_norm : args.key_norm;
  const bool normalised = (is_query || is_key) && norm.kind != NormKind::kNone;
  const bool rotated = (is_query || is_key) && args.rotary.rotary_dim > 0;
  if (cache_row < 0 && !normalised && !rotated) {
    return;
  }

  using Elements = Run<Element, kRun>;
  Element* row = static_cast<Element*>(args.qkv) + token * args.token_stride + h * head_dim;
  Head<kRun> head;
  head.each_run(head_dim, [&](float(&x)[kRun], int first) {
    const Elements run = *reinterpret_cast<const Elements*>(row + first);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      x[i] = to_float(run.element[i]);
    }
  });
  const auto store = [&](Element* target) {
    head.each_run(head_dim, [&](float(&x)[kRun], int first) {
      Elements run;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        store_float(&run.element[i], x[i]);
        x[i] = to_float(run.element[i]);
      }
      *reinterpret_cast<Elements*>(target + first) = run;
    });
  };
  if (normalised) {
    normalise(norm, head_dim, head);
  }
  if (rotated) {
    rotate(args.rotary, token, head_dim, shared[warp], head);
  }
  if (normalised || rotated) {
    store(row);
  }
  if (cache_row < 0) {
    return;
  }
  const int kv_head = h - num_heads - (is_key ? 0 : num_kv_heads);
  const std::int64_t place =
      (static_cast<std::int64_t>(cache_row) / kPageTokens * num_kv_heads + kv_head) * kPageTokens +
      cache_row % kPageTokens;
  void* cache = is_key ? args.pages.keys : args.pages.values;
  if (args.pages.dtype == DType::kInt8) {
    append_codes(static_cast<std::int8_t*>(cache) + place * head_dim,
                 (is_key ? args.pages.key_scales : args.pages.value_scales) + place, head_dim,
                 head);
  } else {
    store(static_cast<Element*>(cache) + place * head_dim);
  }
}

void check(const DeviceAppendKvArgs& args) {
  MOQ_CHECK(is_float(args.dtype), "append_kv: dtype must be float16, bfloat16 or float32, got ",
            name_of(args.dtype));
  MOQ_CHECK(args.num_tokens >= 0, "append_kv: num_tokens must be >= 0, got ", args.num_tokens);
  MOQ_CHECK(args.num_heads >= 1 && args.num_kv_heads >= 1,
            "append_kv: num_heads and num_kv_heads must be >= 1, got ", args.num_heads, " and ",
            args.num_kv_heads);
  MOQ_CHECK(args.head_dim >= 1 && args.head_dim <= kMaxHeadDim,
            "append_kv: head_dim must be in [1, ", kMaxHeadDim, "], got ", args.head_dim);
  const std::int64_t width = (args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  MOQ_CHECK(args.num_tokens <= 1 || args.token_stride >= width,
            "append_kv: token_stride must be >= ", width, ", got ", args.token_stride);
  MOQ_CHECK(args.num_tokens == 0 || args.qkv != nullptr, "append_kv: qkv must not be null");
  const DeviceRotary& rotary = args.rotary;
  MOQ_CHECK(
      rotary.rotary_dim >= 0 && rotary.rotary_dim % 2 == 0 && rotary.rotary_dim <= args.head_dim,
      "append_kv: rotary_dim must be even and at most head_dim, got ", rotary.rotary_dim, " and ",
      args.head_dim);
  MOQ_CHECK(rotary.rotary_dim == 0 ||
                (rotary.positions != nullptr && rotary.cos != nullptr && rotary.sin != nullptr),
            "append_kv: rotary needs positions, cos and sin");
  for (const DeviceNorm& norm : {args.query_norm, args.key_norm}) {
    MOQ_CHECK(norm.kind == NormKind::kNone || norm.weight != nullptr,
              "append_kv: a norm needs weight");
  }
  check_pages(args.pages, args.dtype, "append_kv");
  MOQ_CHECK(args.pages.keys == nullptr || args.cache_rows != nullptr,
            "append_kv: pages need cache_rows");
}

}  // namespace

void check_pages(const DevicePages& pages, DType dtype, const char* op) {
  if (pages.keys == nullptr) {
    return;
  }
  MOQ_CHECK(pages.values != nullptr, op, ": pages need values");
  MOQ_CHECK(pages.dtype == dtype || pages.dtype == DType::kInt8, op, ": pages must be int8 or ",
            name_of(dtype), " as the activations, got ", name_of(pages.dtype));
  MOQ_CHECK(
      pages.dtype != DType::kInt8 || (pages.key_scales != nullptr && pages.value_scales != nullptr),
      op, ": int8 pages need key_scales and value_scales");
}

void append_kv(const DeviceAppendKvArgs& args, cudaStream_t stream) {
  check(args);
  const bool rotates = args.rotary.rotary_dim > 0;
  const bool changes_queries = rotates || args.query_norm.kind != NormKind::kNone;
  const bool changes_keys = rotates || args.key_norm.kind != NormKind::kNone;
  if (args.num_tokens == 0 || (!changes_queries && !changes_keys && args.pages.keys == nullptr)) {
    return;
  }
  const std::int64_t first_head = changes_queries ? 0 : args.num_heads;
  const std::int64_t items =
      args.num_tokens * (args.num_heads + 2 * args.num_kv_heads - first_head);
  const std::int64_t blocks = (items + kWarps - 1) / kWarps;
  visit_float(args.dtype, [&]<typename Element>(Element) {
    const auto begins_pairs = [](const void* pointer) {
      return reinterpret_cast<std::uintptr_t>(pointer) % (2 * sizeof(Element)) == 0;
    };
    const bool pairs = args.head_dim % 2 == 0 && args.token_stride % 2 == 0 &&
                       begins_pairs(args.qkv) && begins_pairs(args.pages.keys) &&
                       begins_pairs(args.pages.values);
    launch(pairs ? append_kv_kernel<Element, 2> : append_kv_kernel<Element, 1>,
           dim3(static_cast<unsigned>(blocks)), dim3(kWarps * kWarpSize), 0, stream, args,
           static_cast<int>(first_head));
  });
}

}  // namespace moq::kernels::cuda
