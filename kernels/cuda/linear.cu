// Linear layers on a GPU: checks, the choice of a kernel, and the plain kernel that every other is
// an answer to in special cases.
#include <cuda_runtime.h>

#include "kernels/common/visit.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_kernels.h"
#include "kernels/linear.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarps = 4;   // of a block; each takes a block of rows
constexpr int kTokens = 4;  // that a warp multiplies at once

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

/// Two runs of the same columns, of rows g and g + 8: what a lane owns of a block.
template <typename Weight>
struct alignas(16) LaneBytes {
  static constexpr int kRun = kLaneRunBytes / static_cast<int>(sizeof(Weight));
  Weight element[2][kRun];
};

/// A warp multiplies 16 rows of the weight by kTokens tokens, in float32 throughout.
template <typename Weight, typename Element>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    plain_linear(DeviceLinearArgs args, DeviceLayout layout) {
  using Lane = LaneBytes<Weight>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t row_block =
      static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
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
  const auto* input = static_cast<const Element*>(args.input);

  for (std::int64_t token = static_cast<std::int64_t>(blockIdx.y) * kTokens; token < args.m;
       token += static_cast<std::int64_t>(gridDim.y) * kTokens) {
    float sums[2][kTokens] = {};
    for (std::int64_t b = 0; b < layout.col_blocks; ++b) {
      const Lane bytes = blocks[b * kWarpSize];
#pragma unroll
      for (int i = 0; i < Lane::kRun; ++i) {
        const std::int64_t col =
            b * layout.block_cols + column_of(static_cast<int>(sizeof(Weight)), lane % 4, i);
        if (col < layout.k) {
          float weight[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const std::int64_t grid =
                layout.groups == 0 ? 0 : col / layout.group_size * kBlockRows + 8 * half;
            const float zero_point = layout.asymmetric ? zero_points[grid] : 0.0F;
            const float scale = layout.groups == 0 ? 1.0F : scales[grid];
            weight[half] = Stored<Weight>::value(bytes.element[half][i], zero_point) * scale;
          }
#pragma unroll
          for (int j = 0; j < kTokens; ++j) {
            if (token + j < args.m) {
              const float x = to_float(input[(token + j) * args.input_stride + col]);
              sums[0][j] = fmaf(weight[0], x, sums[0][j]);
              sums[1][j] = fmaf(weight[1], x, sums[1][j]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = row_block * kBlockRows + lane / 4 + 8 * half;
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        float sum = sums[half][j];
        sum += __shfl_xor_sync(0xffffffffU, sum, 1);
        sum += __shfl_xor_sync(0xffffffffU, sum, 2);
        if (lane % 4 == j % 4 && row < layout.n && token + j < args.m) {
          finish<Element>(args, token + j, row, sum);
        }
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
    plain_linear<Weight, Element><<<grid, kWarps * kWarpSize, 0, stream>>>(args, layout);
  });
  MOQ_CUDA_CHECK(cudaGetLastError());
}

void check(const DeviceLinearArgs& args, const DeviceLayout& layout) {
  MOQ_CHECK(is_float(args.dtype), "linear: dtype must be float16, bfloat16 or float32, got ",
            name_of(args.dtype));
  MOQ_CHECK(args.m >= 0, "linear: m must be >= 0, got ", args.m);
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
  MOQ_CHECK(args.m == 1 || args.input_stride >= layout.k, "linear: input_stride must be >= k, got ",
            args.input_stride, " and ", layout.k);
  MOQ_CHECK(args.m == 1 || args.output_stride >= layout.n,
            "linear: output_stride must be >= n, got ", args.output_stride, " and ", layout.n);
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

void linear(const DeviceLinearArgs& args, cudaStream_t stream) {
  const DeviceLayout layout = device_layout(args.weight.shape);
  check(args, layout);
  if (args.m == 0 || layout.n == 0) {
    return;
  }
  if (can_stream(args, layout)) {
    return stream_linear(args, layout, stream);
  }
  if (can_tile(args, layout)) {
    return tile_linear(args, layout, stream);
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
