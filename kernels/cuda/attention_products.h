#pragma once

#include <cstdint>

#include "kernels/cuda/attention_softmax.h"
#include "kernels/cuda/attention_tile.h"
#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/ptx.h"

/// What a warp does with a tile of keys and values by mma.m16n8k16: scores, and the products of the
/// probabilities with the values. Device code only.
namespace moq::kernels::cuda {

/// Codes as the numbers of a 16-bit dtype.
template <bool kBFloat16>
__device__ void convert_codes(std::uint32_t codes, std::uint32_t (&pairs)[2]) {
  convert<kBFloat16>(codes ^ 0x80808080U, zero_pair<kBFloat16>(0.0F), pairs);
}

/// Bytes from row to row of queries in shared memory.
template <int kDim>
constexpr int kQueryRowBytes = kDim * 2 + 16;

/// A fragments of a tile of rows, dimensions 16 step to 16 step + 15, in the order of
/// key_fragments. Of the 16 rows the first `existing` lie there; what stands for others does not
/// matter.
template <bool kInt8, int kDim>
__device__ void query_fragments(std::uint32_t rows, int existing, int step, int lane,
                                std::uint32_t (&a)[4]) {
  const auto address = [&](int row) {
    return rows + (row < existing ? row : 0) * kQueryRowBytes<kDim> + 32 * step;
  };
  if constexpr (kInt8) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];"
                   : "=r"(a[half]), "=r"(a[half + 2])
                   : "r"(address(lane / 4 + 8 * half) + 8 * (lane % 4))
                   : "memory");
    }
  } else {
    load_matrices(address(lane & 15) + lane / 16 * 16, a);
  }
}

/// B fragments of the products with 16 keys (two tiles of columns), dimensions 16 step to 16 step +
/// 15. Of codes, four neighbouring dimensions are a lane's.
template <bool kBFloat16, bool kInt8, int kDim>
__device__ void key_fragments(std::uint32_t keys, int step, int lane, std::uint32_t (&b)[2][2]) {
  constexpr int kRowBytes = TileLayout<kInt8, kDim>::kRowBytes;
  if constexpr (kInt8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      std::uint32_t codes;
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(codes)
                   : "r"(keys + (8 * i + lane / 4) * kRowBytes + 16 * step + 4 * (lane % 4))
                   : "memory");
      convert_codes<kBFloat16>(codes, b[i]);
    }
  } else {
    std::uint32_t words[4];
    load_matrices(keys + ((lane & 7) + lane / 16 * 8) * kRowBytes + 32 * step + (lane & 8) * 2,
                  words);
    b[0][0] = words[0];
    b[0][1] = words[1];
    b[1][0] = words[2];
    b[1][1] = words[3];
  }
}

/// Tiles of eight columns of the output whose values a lane loads at once.
template <bool kInt8>
constexpr int kTilesOfPiece = kInt8 ? 4 : 2;

/// B fragments of the products with 16 values, dimensions of one piece.
template <bool kBFloat16, bool kInt8, int kDim>
__device__ void value_fragments(std::uint32_t values, int piece, int lane,
                                std::uint32_t (&b)[kTilesOfPiece<kInt8>][2]) {
  constexpr int kRowBytes = TileLayout<kInt8, kDim>::kRowBytes;
  if constexpr (kInt8) {
    std::uint32_t codes[4];  // four neighbouring dimensions of keys 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = 2 * (lane % 4) + i % 2 + i / 2 * 8;
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(codes[i])
                   : "r"(values + key * kRowBytes + 32 * piece + lane / 4 * 4)
                   : "memory");
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      std::uint32_t pairs[2][2];
      convert_codes<kBFloat16>(__byte_perm(codes[2 * half], codes[2 * half + 1], 0x5140), pairs[0]);
      convert_codes<kBFloat16>(__byte_perm(codes[2 * half], codes[2 * half + 1], 0x7362), pairs[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        b[i][half] = pairs[i / 2][i % 2];
      }
    }
  } else {
    std::uint32_t words[4];
    load_transposed_matrices(values + (lane & 15) * kRowBytes + 32 * piece + lane / 16 * 16, words);
    b[0][0] = words[0];
    b[0][1] = words[1];
    b[1][0] = words[2];
    b[1][1] = words[3];
  }
}

/// The dimension of element e of tile n of an output row, of lane 4g + t.
template <bool kInt8>
__device__ int dim_of(int n, int t, int e) {
  return kInt8 ? n / 4 * 32 + 8 * t + 4 * e + n % 4 : 8 * n + 2 * t + e;
}

/// One tile of keys and values in shared memory: scores, probabilities, and their products with the
/// values added to the output.
///
/// @param is_first  the output is still 0
/// @param query  query(step, fragments): the A fragments of the rows, dimensions 16 step and on
/// @param sight  sight(r, half) of the rows
template <bool kBFloat16, bool kInt8, int kDim, int kKeys, int kRowTiles, typename Query,
          typename GetSight>
__device__ void attend(std::uint32_t stage, const Query& query, const GetSight& sight, int first,
                       bool is_first, bool hides, bool alibi, float scale, int lane,
                       Softmax<kRowTiles>& softmax, float (&output)[kRowTiles][kDim / 8][4]) {
  using Layout = TileLayout<kInt8, kDim>;
  constexpr int kKeyTiles = kKeys / 8;
  const int t = lane % 4;
  float scores[kRowTiles][kKeyTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    std::uint32_t a[kRowTiles][4];
    query(step, a);
#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
      std::uint32_t b[2][2];
      key_fragments<kBFloat16, kInt8, kDim>(stage + 8 * k * Layout::kRowBytes, step, lane, b);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_accumulate<kBFloat16>(scores[r][k], a[r], b[0][0], b[0][1]);
        multiply_accumulate<kBFloat16>(scores[r][k + 1], a[r], b[1][0], b[1][1]);
      }
    }
  }
  float value_scales[kKeyTiles][2];
  if constexpr (kInt8) {
    const std::uint32_t scales = stage + 2 * kKeys * Layout::kRowBytes + 8 * t;
#pragma unroll
    for (int k = 0; k < kKeyTiles; ++k) {
      float key_scales[2];
      asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];"
                   : "=f"(key_scales[0]), "=f"(key_scales[1])
                   : "r"(scales + 32 * k)
                   : "memory");
      asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];"
                   : "=f"(value_scales[k][0]), "=f"(value_scales[k][1])
                   : "r"(scales + 32 * k + 4 * kKeys)
                   : "memory");
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[r][k][i] *= key_scales[i % 2];
        }
      }
    }
  }
  if (alibi) {
    add_alibi(scores, sight, first, t);
  }
  if (hides) {
    hide_keys(scores, sight, first, t);
  }
  float shrink[kRowTiles][2];
  if (raise_references<kInt8>(scores, softmax, scale, value_scales, shrink) && !is_first) {
    shrink_output(output, shrink);
  }
  exponentiate<kInt8>(scores, softmax, scale, value_scales);
  const std::uint32_t values = stage + kKeys * Layout::kRowBytes;
#pragma unroll
  for (int k = 0; k < kKeyTiles; k += 2) {
    std::uint32_t a[kRowTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[r][i] = round_pair<kBFloat16>(scores[r][k + i / 2][i % 2 * 2],
                                        scores[r][k + i / 2][i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int piece = 0; piece < kDim / 8 / kTilesOfPiece<kInt8>; ++piece) {
      std::uint32_t b[kTilesOfPiece<kInt8>][2];
      value_fragments<kBFloat16, kInt8, kDim>(values + 8 * k * Layout::kRowBytes, piece, lane, b);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < kTilesOfPiece<kInt8>; ++i) {
          multiply_accumulate<kBFloat16>(output[r][piece * kTilesOfPiece<kInt8> + i], a[r], b[i][0],
                                         b[i][1]);
        }
      }
    }
  }
}

/// The rows of a warp, divided by the sums of their probabilities and rounded, to shared memory:
/// rows of kQueryRowBytes.
template <bool kBFloat16, bool kInt8, int kDim, int kRowTiles>
__device__ void finish_rows(std::uint8_t* rows, int lane, const Softmax<kRowTiles>& softmax,
                            const float (&output)[kRowTiles][kDim / 8][4]) {
  using Element = typename ElementOf<kBFloat16>::Type;
  const int g = lane / 4;
  const int t = lane % 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = __fdividef(1.0F, sum_of_row(softmax.sum[r][half]));
      auto* row = reinterpret_cast<Element*>(rows + (r * kRowsOfTile + g + 8 * half) *
                                                        kQueryRowBytes<kDim>);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const float low = output[r][n][2 * half] * inverse;
        const float high = output[r][n][2 * half + 1] * inverse;
        if constexpr (kInt8) {
          store_float(row + dim_of<kInt8>(n, t, 0), low);
          store_float(row + dim_of<kInt8>(n, t, 1), high);
        } else {
          *reinterpret_cast<std::uint32_t*>(row + dim_of<kInt8>(n, t, 0)) =
              round_pair<kBFloat16>(low, high);
        }
      }
    }
  }
}

}  // namespace moq::kernels::cuda
