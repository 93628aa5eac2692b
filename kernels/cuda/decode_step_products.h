#pragma once

#include "kernels/cuda/decode_step_stream.h"

/// Products of the packed weight with numbers that are not rounded to 8 bits. Device code only.
///
/// A warp takes every kWarps-th column block of the input. Its numbers become integers of 31 bits,
/// x = rint(y * 2^e) with e from the greatest of them, and these four signed digits of 8 bits:
/// x = d0 + 2^8 d1 + 2^16 d2 + 2^24 d3. A block of the packed weight is the A fragment of
/// mma.m16n8k32 as it lies, of codes + 128; the digits are columns 0 to 3 of B, and again 4 to 7.
/// Lane 4 g + t gets sums of digits 0 and 1 (t even) or 2 and 3 (t odd) for rows g and g + 8.
/// 128 * the sum of all digits is taken off.
namespace moq::kernels::cuda::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ void multiply_digits(int (&sums)[4], const uint4& codes,
                                                const std::uint32_t (&digits)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(codes.x), "r"(codes.z), "r"(codes.y), "r"(codes.w), "r"(digits[0]), "r"(digits[1]));
}

/// Digit i of four numbers in bytes 0 to 3 of word i. (Adding and flipping 0x808080 makes three
/// unsigned bytes signed and carries into the next.)
__device__ __forceinline__ uint4 digits_of(const float (&numbers)[4], float factor) {
  std::uint32_t x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[j] = (static_cast<std::uint32_t>(__float2int_rn(numbers[j] * factor)) + 0x00808080U) ^
           0x00808080U;
  }
  const std::uint32_t low01 = __byte_perm(x[0], x[1], 0x5140);
  const std::uint32_t low23 = __byte_perm(x[2], x[3], 0x5140);
  const std::uint32_t high01 = __byte_perm(x[0], x[1], 0x7362);
  const std::uint32_t high23 = __byte_perm(x[2], x[3], 0x7362);
  return {__byte_perm(low01, low23, 0x5410), __byte_perm(low01, low23, 0x7632),
          __byte_perm(high01, high23, 0x5410), __byte_perm(high01, high23, 0x7632)};
}

/// A warp's part of an input as digits in shared memory, and what its products need beside them.
struct Digits {
  uint4* words;            ///< [words of the warp], this warp's
  std::uint32_t fragment;  ///< where this lane's part of the first column block lies
  float unit = 0.0F;       ///< of the lower digit in this lane's sums
  int offset[2] = {};      ///< 128 times the sum of each of its two digits

  __device__ Digits(uint4* own, int lane)
      : words(own), fragment(shared_address(own) + (lane % 4) * 16 + (lane / 4 % 4) * 4) {}

  /// Lane l has words l, l + 32, … of `count`; what lies behind is 0. A NaN or an infinity makes
  /// all sums NaN.
  template <int kWords>
  __device__ __forceinline__ void write(const float (&numbers)[kWords][4], int lane) {
    constexpr int kSmallest = 40;  // exponent; keeps the unit a normal number
    constexpr int kBits = 29;
    constexpr int kBias = 127;
    std::uint32_t greatest = 0;  // as bits, whose order puts a NaN above all
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        greatest = max(greatest, __float_as_uint(fabsf(numbers[q][j])));
      }
    }
    const int exponent =
        max(static_cast<int>(__reduce_max_sync(kWholeWarp, greatest) >> 23), kSmallest);
    const bool odd = (lane & 1) != 0;
    const float factor =
        __uint_as_float(static_cast<std::uint32_t>(kBits + 2 * kBias - exponent) << 23);
    unit =
        exponent == 255
            ? __uint_as_float(0x7fffffffU)
            : __uint_as_float(static_cast<std::uint32_t>(exponent - kBits + (odd ? 16 : 0)) << 23);
    int sums[4] = {};
#pragma unroll
    for (int q = 0; q < kWords; ++q) {
      const uint4 digits = digits_of(numbers[q], factor);
      words[q * kWarpSize + lane] = digits;
      sums[0] = __dp4a(static_cast<int>(digits.x), 0x01010101, sums[0]);
      sums[1] = __dp4a(static_cast<int>(digits.y), 0x01010101, sums[1]);
      sums[2] = __dp4a(static_cast<int>(digits.z), 0x01010101, sums[2]);
      sums[3] = __dp4a(static_cast<int>(digits.w), 0x01010101, sums[3]);
    }
#pragma unroll
    for (int& sum : sums) {
      sum = __reduce_add_sync(kWholeWarp, sum);
    }
    offset[0] = 128 * (odd ? sums[2] : sums[0]);
    offset[1] = 128 * (odd ? sums[3] : sums[1]);
    __syncwarp();
  }

  /// This warp's sums of 16 rows, of which lanes with t < 2 store one each.
  __device__ __forceinline__ void store_sums(const int (&sums)[4], int lane,
                                             std::uint32_t target) const {
    const auto number = [&](int low, int high) {
      return fmaf(static_cast<float>(high - offset[1]), 256.0F,
                  static_cast<float>(low - offset[0])) *
             unit;
    };
    const float upper = number(sums[0], sums[1]);
    const float lower = number(sums[2], sums[3]);
    const float kept = (lane & 1) != 0 ? lower : upper;
    const float sent = (lane & 1) != 0 ? upper : lower;
    const float total = kept + __shfl_xor_sync(kWholeWarp, sent, 1);
    if (lane % 4 < 2) {
      store_shared(target, total);
    }
  }
};

/// A warp's column blocks of 16 rows (or of a piece of them), as many as `kRounds` at most: those
/// that are `first` + a multiple of kWarps.
template <int kRounds>
struct Fragments {
  uint4 codes[kRounds];

  __device__ __forceinline__ void load(Stages& stages, int first, bool last_round, int lane) {
    stages.wait();
    const std::uint32_t address = stages.stage + lane * 16 + first * kBlockBytes;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if (i < kRounds - 1 || last_round) {
        codes[i] = load_shared_quad(address + i * kWarps * kBlockBytes);
      }
    }
    stages.advance();
  }

  __device__ __forceinline__ void multiply(int (&sums)[4],
                                           const std::uint32_t (&digits)[kRounds][2],
                                           bool last_round) const {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      if (i < kRounds - 1 || last_round) {
        multiply_digits(sums, codes[i], digits[i]);
      }
    }
  }
};

/// This lane's digits of as many column blocks.
template <int kRounds>
__device__ __forceinline__ void load_digits(std::uint32_t (&digits)[kRounds][2],
                                            std::uint32_t address, bool last_round) {
  constexpr int kBytes = kBlockWords * 16;
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    if (i < kRounds - 1 || last_round) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        asm volatile("ld.shared.u32 %0, [%1];"
                     : "=r"(digits[i][half])
                     : "r"(address + i * kBytes + half * kBytes / 2)
                     : "memory");
      }
    }
  }
}

#endif

}  // namespace moq::kernels::cuda::step
