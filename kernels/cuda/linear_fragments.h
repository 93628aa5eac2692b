#pragma once

#include <cstdint>

#include "kernels/common/half.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/cuda/ptx.h"

/// From 16 stored bytes of a lane to A fragments of mma.m16n8k16. Device code only.
namespace moq::kernels::cuda {

template <bool kBFloat16>
struct ElementOf {
  using Type = Float16;
};
template <>
struct ElementOf<true> {
  using Type = BFloat16;
};

template <bool kBFloat16>
__device__ void subtract(std::uint32_t (&pair)[2], std::uint32_t amount) {
#pragma unroll
  for (std::uint32_t& word : pair) {
    word = kBFloat16 ? subtract_bf16x2(word, amount) : subtract_f16x2(word, amount);
  }
}

/// The numbers code - zero_point of four stored bytes, as two pairs. Exact in both dtypes.
/// float16: 0x6400 + u is 1024 + u; what stands for zero there is subtracted. bfloat16 has 7 bits
/// of mantissa: 0x4300 + (u mod 128) is 128 + u mod 128, and 128 or 256 is subtracted, by the top
/// bit.
template <bool kBFloat16>
__device__ void convert(std::uint32_t bytes, std::uint32_t zero, std::uint32_t (&pairs)[2]) {
  if constexpr (kBFloat16) {
    pairs[0] = __byte_perm(bytes, 0, 0x4140);
    pairs[1] = __byte_perm(bytes, 0, 0x4342);
#pragma unroll
    for (std::uint32_t& word : pairs) {
      const std::uint32_t low = (word & 0x007f007fU) | 0x43004300U;
      word = subtract_bf16x2(low, (word & 0x00800080U) ^ 0x43804380U);
    }
    if (zero != 0) {
      subtract<true>(pairs, zero);
    }
  } else {
    pairs[0] = __byte_perm(bytes, 0x64646464U, 0x4140);
    pairs[1] = __byte_perm(bytes, 0x64646464U, 0x4342);
    subtract<false>(pairs, zero);
  }
}

/// The pair that convert subtracts for a zero point, an integer of at most 8 bits: float16
/// 1152 + zero_point, bfloat16 zero_point.
template <bool kBFloat16>
__device__ std::uint32_t zero_pair(float zero_point) {
  const std::uint32_t bits = kBFloat16
                                 ? __float_as_uint(zero_point) >> 16
                                 : static_cast<std::uint32_t>(0x6480 + __float2int_rn(zero_point));
  return bits << 16 | bits;
}

/// Rows g and g + 8 of a block: their scales and what stands for zero.
struct Grids {
  float scale[2];
  std::uint32_t zero[2];
};

template <bool kBFloat16>
__device__ Grids load_grids(const void* weight, const DeviceLayout& layout, std::int64_t row_block,
                            std::int64_t group, int g) {
  const auto* packed = static_cast<const char*>(weight);
  const std::int64_t first = (row_block * layout.groups + group) * kBlockRows + g;
  const auto* scales = reinterpret_cast<const float*>(packed + layout.scales_offset) + first;
  const auto* zero_points =
      reinterpret_cast<const float*>(packed + layout.zero_points_offset) + first;
  Grids grids;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    grids.scale[half] = scales[8 * half];
    grids.zero[half] = zero_pair<kBFloat16>(layout.asymmetric ? zero_points[8 * half] : 0.0F);
  }
  return grids;
}

/// A lane's part of a block as A fragments: of two products for one-byte elements, of the first and
/// the second 16 columns, and of one for two-byte elements.
template <bool kBFloat16, int kElementBytes>
__device__ void fragments(const uint4& bytes, const std::uint32_t (&zero)[2],
                          std::uint32_t (&a)[3 - kElementBytes][4]) {
  if constexpr (kElementBytes == 1) {
    std::uint32_t upper[2][2];
    std::uint32_t lower[2][2];
    convert<kBFloat16>(bytes.x, zero[0], upper[0]);
    convert<kBFloat16>(bytes.y, zero[0], upper[1]);
    convert<kBFloat16>(bytes.z, zero[1], lower[0]);
    convert<kBFloat16>(bytes.w, zero[1], lower[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i][0] = upper[i][0];
      a[i][1] = lower[i][0];
      a[i][2] = upper[i][1];
      a[i][3] = lower[i][1];
    }
  } else {
    a[0][0] = bytes.x;
    a[0][1] = bytes.y;
    a[0][2] = bytes.z;
    a[0][3] = bytes.w;
  }
}

}  // namespace moq::kernels::cuda
