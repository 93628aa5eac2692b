#pragma once

#include <cstdint>

#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/cuda/linear_wgmma_tile.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/wgmma.h"

/// The loop of wgmma_linear over the columns of a tile. Device code only.
///
/// The weight's rows are the rows of a product, from registers, and tokens its columns, from shared
/// memory as a tensor map lays them out. A lane's 16 bytes of a packed block become the registers
/// of two products (one-byte elements) or one while the products before them run.
namespace moq::kernels::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

/// Numbers of rows g and g + 8 of a row block.
__device__ inline float2 load_row_pair(std::uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.f32 %0, [%2]; ld.shared.f32 %1, [%2 + 32];"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(address)
               : "memory");
  return pair;
}

/// A lane's weights of half a step, as they are stored.
template <typename T>
struct WgmmaWeights {
  uint4 bytes[T::kElementBytes];

  /// row_block: of the tile.
  __device__ __forceinline__ void load(const WgmmaRing<T>& ring, std::uint32_t stage, int half,
                                       int row_block) {
    const std::uint32_t blocks =
        ring.weights(stage) + static_cast<int>(threadIdx.x) % kWarpSize * 16 +
        (row_block * T::kStepBlocks + half * T::kElementBytes) * kBlockBytes;
#pragma unroll
    for (int i = 0; i < T::kElementBytes; ++i) {
      bytes[i] = load_shared_quad(blocks + i * kBlockBytes);
    }
  }

  /// The registers of the first or the last 16 columns. zero: what codes of rows g and g + 8 are
  /// relative to.
  __device__ __forceinline__ void convert(int sixteen, const std::uint32_t (&zero)[2],
                                          std::uint32_t (&a)[4]) const {
    if constexpr (T::kElementBytes == 1) {
      std::uint32_t upper[2];
      std::uint32_t lower[2];
      cuda::convert<T::kBFloat16>(sixteen == 0 ? bytes[0].x : bytes[0].y, zero[0], upper);
      cuda::convert<T::kBFloat16>(sixteen == 0 ? bytes[0].z : bytes[0].w, zero[1], lower);
      a[0] = upper[0];
      a[1] = lower[0];
      a[2] = upper[1];
      a[3] = lower[1];
    } else {
      a[0] = bytes[sixteen].x;
      a[1] = bytes[sixteen].y;
      a[2] = bytes[sixteen].z;
      a[3] = bytes[sixteen].w;
    }
  }

  /// Lets nothing be made of what was loaded until here: a product that is under way may still read
  /// the registers for it, of which the compiler does not know.
  __device__ __forceinline__ void hold() {
    if constexpr (T::kElementBytes == 1) {
      asm volatile("" : "+r"(bytes[0].x), "+r"(bytes[0].y), "+r"(bytes[0].z), "+r"(bytes[0].w));
    }
  }
};

/// The sums of 64 rows by kTokens tokens: a warpgroup's part of a tile whose rows have one scale
/// each, which the sums are without.
template <typename T>
struct WgmmaSums {
  float sums[T::kTokens / 2];

  __device__ __forceinline__ float result(int i) const { return sums[i]; }

  /// Makes the registers of the first step, which lies at `slot` of the ring. row_block: the
  /// warp's, of the tile. Where T::kFirstApart, once in a block's life.
  __device__ __forceinline__ void begin(const WgmmaRing<T>& ring, const WgmmaSlot<T>& slot,
                                        int row_block, const std::uint32_t (&zero)[2]) {
    if constexpr (T::kFirstApart) {
      wait_barrier(ring.first_weights(slot.stage), 0);
    } else {
      ring.wait(slot);
    }
    WgmmaWeights<T> weights[2];
    load(ring, slot, row_block, weights);
    convert(weights, zero, a_[0]);
    if constexpr (T::kFirstApart) {
#pragma unroll
      for (const auto& product : a_[0]) {
        need_now(product);
      }
    }
  }

  /// Multiplies so many steps, which lie in the ring from `slot` on, behind begin().
  ///
  /// While the products of a step are under way, the registers of the next are made, when the
  /// products of the step before, whose registers they are, have ended. What is converted is loaded
  /// before that, into other registers. (What is not must never be in both: the compiler takes
  /// registers for free that products under way still read.)
  __device__ __forceinline__ void multiply(const WgmmaRing<T>& ring, WgmmaSlot<T>& slot, int steps,
                                           int row_block, const std::uint32_t (&zero)[2]) {
    constexpr bool kConverts = T::kElementBytes == 1;
    WgmmaWeights<T> weights[2];  // that are converted
    const auto load_next = [&](WgmmaWeights<T>(&to)[2]) {
      ring.wait(slot);
      load(ring, slot, row_block, to);
    };
    if constexpr (T::kFirstApart) {
      ring.wait(slot);  // for the tokens
    }
    WgmmaSlot<T> done = slot;
    int left = steps;
    int keeps = 0;
    const auto multiply_step = [&](const std::uint32_t(&own)[4][4], std::uint32_t(&next)[4][4]) {
      const std::uint64_t tokens = token_descriptor(ring.tokens(slot.stage));
      begin_products();
#pragma unroll
      for (int product = 0; product < 4; ++product) {
        multiply_tokens<T::kBFloat16>(sums, own[product], tokens + 2 * product,
                                      product == 0 ? keeps : 1);
      }
      close_products();
      slot.advance();
      if (kConverts && left > 1) {
        load_next(weights);
      }
      wait_products<1>();
      if (keeps != 0) {
        ring.free(done);
        done.advance();
      }
      keeps = 1;
      // Behind the last step there is nothing to convert. Were it done all the same, the compiler
      // would let every product wait for the one before (ptxas says so, in C7513).
      if (left > 1) {
        if constexpr (kConverts) {
          convert(weights, zero, next);
        } else {
          WgmmaWeights<T> loaded[2];
          load_next(loaded);
          convert(loaded, zero, next);
        }
      }
      return --left > 0;
    };
    while (multiply_step(a_[0], a_[1]) && multiply_step(a_[1], a_[0])) {
    }
    wait_products<0>();
    ring.free(done);
  }

 private:
  __device__ __forceinline__ static void load(const WgmmaRing<T>& ring, const WgmmaSlot<T>& slot,
                                              int row_block, WgmmaWeights<T> (&to)[2]) {
    to[0].load(ring, slot.stage, 0, row_block);
    to[1].load(ring, slot.stage, 1, row_block);
  }
  __device__ __forceinline__ static void convert(WgmmaWeights<T> (&from)[2],
                                                 const std::uint32_t (&zero)[2],
                                                 std::uint32_t (&to)[4][4]) {
    from[0].hold();
    from[1].hold();
#pragma unroll
    for (int product = 0; product < 4; ++product) {
      from[product / 2].convert(product % 2, zero, to[product]);
    }
  }

  std::uint32_t a_[2][4][4];  ///< of two steps in turn
};

/// The same of a tile whose rows have groups of columns: each group's sums are scaled.
template <typename T>
struct WgmmaGroupSums {
  float sums[T::kTokens / 2];
  float totals[T::kTokens / 2];

  __device__ __forceinline__ float result(int i) const { return totals[i]; }

  /// Multiplies the steps [first, first + steps), which lie in the ring from `slot` on. A product
  /// is under way while the registers of the next are made.
  __device__ __forceinline__ void multiply(const WgmmaRing<T>& ring, WgmmaSlot<T>& slot, int first,
                                           int steps, int row_block, const DeviceLayout& layout) {
    const int group_halves = static_cast<int>(layout.group_size) / kHalfCols;
    int halves_left = group_halves - 2 * first % group_halves;
#pragma unroll
    for (float& total : totals) {
      total = 0.0F;
    }
    WgmmaWeights<T> weights[2];
    std::uint32_t zero[2][2];
    float2 scale[2];
    const auto load = [&](int half, int group) {
      weights[half].load(ring, slot.stage, half, row_block);
      const std::uint32_t grid = (row_block * T::kGridGroups + group) * kBlockRows * 4 +
                                 static_cast<int>(threadIdx.x) % kWarpSize / 4 * 4;
      zero[half][0] = zero[half][1] = zero_pair<T::kBFloat16>(0.0F);
      if (layout.asymmetric) {
        const float2 points = load_row_pair(ring.zero_points(slot.stage) + grid);
        zero[half][0] = zero_pair<T::kBFloat16>(points.x);
        zero[half][1] = zero_pair<T::kBFloat16>(points.y);
      }
      scale[half] = load_row_pair(ring.scales(slot.stage) + grid);
    };
    std::uint32_t a[4][4];
    ring.wait(slot);
    load(0, 0);
    weights[0].convert(0, zero[0], a[0]);
    WgmmaSlot<T> done = slot;
    int keeps = 0;
    for (int step = 0; step < steps; ++step) {
      const std::uint64_t tokens = token_descriptor(ring.tokens(slot.stage));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int sixteen = 0; sixteen < 2; ++sixteen) {
          const int product = 2 * half + sixteen;
          begin_products();
          multiply_tokens<T::kBFloat16>(sums, a[product], tokens + 2 * product,
                                        sixteen == 0 ? keeps : 1);
          close_products();
          wait_products<1>();
          if (sixteen == 0) {
            // The last product of the half before has ended, and its weights are not needed.
            if (half == 0) {
              if (step > 0) {
                ring.free(done);
                done.advance();
              }
              load(1, halves_left == 1 ? 1 : 0);
            } else {
              slot.advance();
              if (step + 1 < steps) {
                ring.wait(slot);
                load(0, 0);
              }
            }
          }
          const int of = sixteen == 0 ? half : half ^ 1;
          weights[of].convert(sixteen ^ 1, zero[of], a[(product + 1) % 4]);
        }
        keeps = 1;
        if (--halves_left == 0) {
          wait_products<0>();
          add_group(scale[half]);
          halves_left = group_halves;
          keeps = 0;
        }
      }
    }
    wait_products<0>();
    ring.free(done);
    if (keeps != 0) {
      add_group(scale[1]);
    }
  }

  __device__ __forceinline__ void add_group(const float2& scale) {
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; ++i) {
      totals[i] = fmaf(sums[i], i % 4 / 2 == 0 ? scale.x : scale.y, totals[i]);
    }
  }
};

#endif

}  // namespace moq::kernels::cuda
