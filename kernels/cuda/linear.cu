// Linear layers on a GPU: checks, the choice of a kernel, and the plain kernel that every other is
// an answer to in special cases.
#include <cuda_runtime.h>

#include "kernels/common/visit.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/cuda/linear_norm.h"
#include "kernels/cuda/ptx.h"
#include "kernels/linear.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarps = 4;   // of a block; each takes a block of rows
constexpr int kTokens = 4;  // that a warp multiplies at once, and lanes that share a row

/// One element of a packed weight as a number, before the scale.
template <typename Weight>
struct Stored {
  __device__ static float value(Weight element, float /*zero_point*/) { return to_float(element); }
};
template <>
struct Stored<std::uint8_t> {
  __device__ static float value(std::uint8_t element, float zero_point) {
    return static_cast<float>(static_cast<int>(element) - 128) - zero_point;
  }
};

/// What a lane owns of a block.
template <typename Weight>
struct alignas(kLaneBytes) LaneElements {
  static constexpr int kCount = kLaneBytes / static_cast<int>(sizeof(Weight));
  Weight element[kCount];
};

/// A warp multiplies 16 rows of the weight by kTokens tokens, in float32 throughout.
template <typename Weight, typename Element>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    plain_linear_kernel(DeviceLinearArgs args, DeviceLayout layout) {
  using Lane = LaneElements<Weight>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t row_block =
      static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  wait_for_previous_kernels();
  allow_next_kernel();
  __shared__ NormStatistics statistics[kNormTokens];
  const auto* input = static_cast<const Element*>(args.input);
  const bool normalises = args.norm.kind != NormKind::kNone;
  if (normalises) {
    const int k = static_cast<int>(layout.k);
    for (int token = static_cast<int>(threadIdx.x) / kWarpSize; token < args.m; token += kWarps) {
      const Element* row = input + token * args.input_stride;
      const Moments moments =
          warp_moments(args.norm.kind, k, lane, [&](int first, float(&x)[kChunk]) {
            for (int i = 0; i < kChunk; ++i) {
              x[i] = first + i < k ? to_float(row[first + i]) : 0.0F;
            }
          });
      if (lane == 0) {
        statistics[token] = statistics_of(args.norm, moments, k);
      }
    }
    __syncthreads();
  }
  if (row_block >= layout.row_blocks) {
    return;
  }
  const auto* packed = static_cast<const char*>(args.weight.data);
  const auto* blocks =
      reinterpret_cast<const Lane*>(packed) + row_block * layout.col_blocks * kWarpSize + lane;
  const std::int64_t grids = row_block * layout.groups * kBlockRows + lane / 4;
  const auto* scales = reinterpret_cast<const float*>(packed + layout.scales_offset) + grids;
  const auto* zero_points =
      reinterpret_cast<const float*>(packed + layout.zero_points_offset) + grids;

  for (std::int64_t token = static_cast<std::int64_t>(blockIdx.y) * kTokens; token < args.m;
       token += static_cast<std::int64_t>(gridDim.y) * kTokens) {
    float sums[2][kTokens] = {};
    for (std::int64_t b = 0; b < layout.col_blocks; ++b) {
      const Lane bytes = blocks[b * kWarpSize];
#pragma unroll
      for (int i = 0; i < Lane::kCount; ++i) {
        // Of a lane's elements of one column, the first is of row g, the other of row g + 8.
        const BlockPlace place = lane_element(static_cast<int>(sizeof(Weight)), lane, i);
        const int half = (place.row - lane / 4) / 8;
        const std::int64_t col = b * layout.block_cols + place.col;
        if (col < layout.k) {
          const std::int64_t grid =
              layout.groups == 0 ? 0 : col / layout.group_size * kBlockRows + 8 * half;
          const float zero_point = layout.asymmetric ? zero_points[grid] : 0.0F;
          const float scale = layout.groups == 0 ? 1.0F : scales[grid];
          const float weight = Stored<Weight>::value(bytes.element[i], zero_point) * scale;
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            if (token + j < args.m) {
              float x = to_float(input[(token + j) * args.input_stride + col]);
              if (normalises) {
                const NormStatistics& row = statistics[token + j];
                x = (x - row.mean) * row.inverse * args.norm.weight[col];
                Element rounded;
                store_float(&rounded, args.norm.bias == nullptr ? x : x + args.norm.bias[col]);
                x = to_float(rounded);
              }
              sums[half][j] = fmaf(weight, x, sums[half][j]);
            }
          }
        }
      }
    }
    // Of the lanes 4g to 4g + 3, which share rows g and g + 8, the one with t = j finishes token j:
    // rows g and g + 1 if g is even, else rows g + 7 and g + 8.
    const int g = lane / 4;
    const std::int64_t row = row_block * kBlockRows + (g % 2 == 0 ? g : g + 7);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      float own[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        own[half] = sums[half][j];
        own[half] += __shfl_xor_sync(0xffffffffU, own[half], 1);
        own[half] += __shfl_xor_sync(0xffffffffU, own[half], 2);
      }
      const float other = __shfl_xor_sync(0xffffffffU, own[1 - g % 2], 4);
      if (lane % 4 == j && row < layout.n && token + j < args.m) {
        const float pair[2] = {g % 2 == 0 ? own[0] : other, g % 2 == 0 ? other : own[1]};
        finish_pair<Element>(args, row + 1 < layout.n, pair,
                             load_pair_inputs<Element>(args, layout.n, token + j, row));
      }
    }
  }
}

template <typename Weight>
void launch_plain(const DeviceLinearArgs& args, const DeviceLayout& layout, cudaStream_t stream) {
  constexpr std::int64_t kMaxGridY = 65535;
  const std::int64_t tiles = (args.m + kTokens - 1) / kTokens;
  const dim3 grid(static_cast<unsigned>((layout.row_blocks + kWarps - 1) / kWarps),
                  static_cast<unsigned>(tiles < kMaxGridY ? tiles : kMaxGridY));
  visit_float(args.dtype, [&]<typename Element>(Element) {
    launch(plain_linear_kernel<Weight, Element>, grid, dim3(kWarps * kWarpSize), 0, stream, args,
           layout);
  });
}

void check_norm(const DeviceLinearArgs& args) {
  const DeviceNorm& norm = args.norm;
  if (norm.kind == NormKind::kNone) {
    return;
  }
  MOQ_CHECK(linear_takes_norm(args.m), "linear: m must be <= ", kNormTokens, " with a norm, got ",
            args.m);
  MOQ_CHECK(norm.weight != nullptr, "linear: norm.weight must not be null");
  MOQ_CHECK(norm.bias == nullptr || norm.kind == NormKind::kLayerNorm,
            "linear: norm.bias must be null for an RMS norm");
  MOQ_CHECK(norm.epsilon >= 0.0F, "linear: norm.epsilon must be >= 0, got ", norm.epsilon);
}

void check_qkv(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  const DeviceQkvOutput& qkv = args.qkv;
  MOQ_CHECK(qkv.head_dim > 0 && qkv.head_dim % 2 == 0,
            "linear: qkv.head_dim must be even and > 0, got ", qkv.head_dim);
  MOQ_CHECK(qkv.num_heads >= 0 && qkv.num_kv_heads >= 0 &&
                (qkv.num_heads + 2LL * qkv.num_kv_heads) * qkv.head_dim == layout.n,
            "linear: n must be (qkv.num_heads + 2 * qkv.num_kv_heads) * qkv.head_dim, got ",
            layout.n, ", ", qkv.num_heads, ", ", qkv.num_kv_heads, " and ", qkv.head_dim);
  MOQ_CHECK(args.activation == Activation::kNone && args.residual == nullptr && !args.gated &&
                !args.float32_output,
            "linear: qkv must be without activation, residual, gated and float32_output");
  const DeviceRotary& rotary = qkv.rotary;
  MOQ_CHECK(
      rotary.rotary_dim >= 0 && rotary.rotary_dim % 2 == 0 && rotary.rotary_dim <= qkv.head_dim,
      "linear: rotary_dim must be even and in [0, qkv.head_dim], got ", rotary.rotary_dim, " and ",
      qkv.head_dim);
  MOQ_CHECK(rotary.rotary_dim == 0 ||
                (rotary.positions != nullptr && rotary.cos != nullptr && rotary.sin != nullptr),
            "linear: positions, cos and sin of a rotation must not be null");
  if (qkv.pages.keys != nullptr) {
    MOQ_CHECK(qkv.pages.values != nullptr && qkv.cache_rows != nullptr,
              "linear: qkv.pages.values and qkv.cache_rows must not be null with qkv.pages.keys");
    MOQ_CHECK(qkv.pages.dtype == args.dtype, "linear: qkv.pages.dtype must be dtype, got ",
              name_of(qkv.pages.dtype), " and ", name_of(args.dtype));
  }
}

/// Columns of the output.
std::int64_t output_cols(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  if (args.qkv.pages.keys != nullptr) {
    return static_cast<std::int64_t>(args.qkv.num_heads) * args.qkv.head_dim;
  }
  return args.gated ? layout.n / 2 : layout.n;
}

void check(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  MOQ_CHECK(is_float(args.dtype), "linear: dtype must be float16, bfloat16 or float32, got ",
            name_of(args.dtype));
  MOQ_CHECK(args.m >= 0, "linear: m must be >= 0, got ", args.m);
  check_norm(args);
  MOQ_CHECK(!args.gated || layout.n % 2 == 0, "linear: n must be even when gated, got ", layout.n);
  MOQ_CHECK(args.residual == nullptr || !(args.gated || args.float32_output),
            "linear: residual must be null with gated or float32_output");
  if (args.qkv.head_dim != 0) {
    check_qkv(args, layout);
  } else {
    MOQ_CHECK(args.qkv.pages.keys == nullptr, "linear: qkv.pages need a qkv.head_dim");
  }
  if (args.m == 0 || layout.n == 0) {
    return;
  }
  MOQ_CHECK(layout.k == 0 || args.input != nullptr, "linear: input must not be null");
  MOQ_CHECK(args.output != nullptr, "linear: output must not be null");
  MOQ_CHECK(layout.bytes == 0 ||
                (args.weight.data != nullptr &&
                 reinterpret_cast<std::uintptr_t>(args.weight.data) % kPackedAlignment == 0),
            "linear: a packed weight must be aligned to ", kPackedAlignment, " bytes, got ",
            args.weight.data);
  MOQ_CHECK(args.next_bytes >= 0 && args.next_bytes % 16 == 0 &&
                reinterpret_cast<std::uintptr_t>(args.next_weight) % 16 == 0,
            "linear: next_weight and next_bytes must be multiples of 16, got ", args.next_weight,
            " and ", args.next_bytes);
  const std::int64_t cols = output_cols(args, layout);
  MOQ_CHECK(args.m == 1 || args.input_stride >= layout.k, "linear: input_stride must be >= k, got ",
            args.input_stride, " and ", layout.k);
  MOQ_CHECK(args.m == 1 || args.output_stride >= cols,
            "linear: output_stride must be >= the columns of output, got ", args.output_stride,
            " and ", cols);
  MOQ_CHECK(args.residual == nullptr || args.m == 1 || args.residual_stride >= layout.n,
            "linear: residual_stride must be >= n, got ", args.residual_stride, " and ", layout.n);
}

}  // namespace

bool suits_tensor_cores(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  const WeightFormat own =
      args.dtype == DType::kFloat16 ? WeightFormat::kFloat16 : WeightFormat::kBFloat16;
  const WeightFormat format = args.weight.shape.format;
  return args.dtype != DType::kFloat32 && layout.k > 0 &&
         (is_integer(format) ? layout.groups == 1 || layout.group_size % layout.block_cols == 0
                             : format == own);
}

bool linear_prefers_norm(const DeviceLinearArgs& args) {
  const DeviceLayout layout = device_layout(args.weight.shape);
  DeviceLinearArgs apart = args;  // aligned rows, one behind the other
  apart.input = nullptr;
  apart.input_stride = layout.k;
  return linear_takes_norm(args.m) && (can_stream(apart, layout) || !can_tile(apart, layout));
}

void linear(const DeviceLinearArgs& args, cudaStream_t stream) {
  const DeviceLayout layout = device_layout(args.weight.shape);
  check(args, layout);
  if (args.m == 0 || layout.n == 0) {
    return;
  }
  const bool suits_wgmma =
      (args.m > kTileTokens || layout.n * layout.k <= kTileWeights) && can_wgmma(args, layout);
  const bool wide = args.m > kWideTokens && suits_wgmma && streams_in_clusters(args, layout);
  if (!wide && can_stream(args, layout)) {
    return stream_linear(args, layout, stream);
  }
  if (suits_wgmma) {
    return wgmma_linear(args, layout, choose_wgmma(args, layout), stream);
  }
  if (can_tile(args, layout) && args.norm.kind == NormKind::kNone) {
    return tile_linear(args, layout, choose_tile(args, layout), stream);
  }
  switch (args.weight.shape.format) {
    case WeightFormat::kFloat32:
      return launch_plain<float>(args, layout, stream);
    case WeightFormat::kFloat16:
      return launch_plain<Float16>(args, layout, stream);
    case WeightFormat::kBFloat16:
      return launch_plain<BFloat16>(args, layout, stream);
    default:
      return launch_plain<std::uint8_t>(args, layout, stream);
  }
}

}  // namespace moq::kernels::cuda
