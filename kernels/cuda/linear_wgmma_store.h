#pragma once

#include <cstdint>
#include <utility>

#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_fragments.h"
#include "kernels/cuda/linear_wgmma_tile.h"
#include "kernels/cuda/vectors.h"

/// What wgmma_linear does with finished sums that go to the output, or keys and values to the
/// cache, as they are. Device code only.
///
/// A warpgroup finishes some tokens at a time where its lanes have them, and transposes them
/// through shared memory as 16-bit numbers, from where they go out 16 bytes a lane.
namespace moq::kernels::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kSize>
__device__ __forceinline__ void activate_all(Activation activation, float (&values)[kSize]) {
  const auto each = [&]<Activation kActivation>() {
#pragma unroll
    for (float& value : values) {
      value = activate(kActivation, value);
    }
  };
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return each.template operator()<Activation::kRelu>();
    case Activation::kGelu:
      return each.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return each.template operator()<Activation::kGeluTanh>();
    case Activation::kQuickGelu:
      return each.template operator()<Activation::kQuickGelu>();
    case Activation::kSilu:
      return each.template operator()<Activation::kSilu>();
    case Activation::kTanh:
      return each.template operator()<Activation::kTanh>();
  }
}

/// Calls use<I>() for the I with I == index: registers have no index at run time.
template <int kSize, typename Use>
__device__ __forceinline__ void with_index(int index, const Use& use) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    (..., (index == kIndices ? use.template operator()<kIndices>() : void()));
  }
  (std::make_integer_sequence<int, kSize>());
}

/// The same numbers, but not to the compiler, which would take their products out of a loop and run
/// out of registers.
__device__ __forceinline__ float2 inside_loop(float2 pair) {
  asm volatile("" : "+f"(pair.x), "+f"(pair.y));
  return pair;
}

/// A warpgroup's way to the output for one tile.
template <typename T>
class WgmmaStore {
 public:
  /// staging: two parts' results in shared memory; barrier: number of the warpgroup's own.
  __device__ WgmmaStore(const DeviceLinearArgs& args, std::int64_t n, std::uint32_t staging,
                        int barrier, int first_token, int first_row)
      : args_(args), staging_(staging), barrier_(barrier), first_token_(first_token) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    if (args.bias != nullptr) {
      const int row = first_row + thread / kWarpSize * kBlockRows + thread % kWarpSize / 4;
      const auto* bias = static_cast<const Element*>(args.bias);
      bias_.x = row < n ? number_of(bias[row]) : 0.0F;
      bias_.y = row + 8 < n ? number_of(bias[row + 8]) : 0.0F;
    }
    const int row = first_row + thread % kChunks * kChunk;
    const int token = first_token + thread / kChunks;
    tokens_left_ = row < n ? static_cast<int>(args.m) - token : 0;
    output_ = static_cast<Element*>(args.output) + token * args.output_stride + row;
    residual_ = static_cast<const Element*>(args.residual) + token * args.residual_stride + row;
    if (args.qkv.pages.keys != nullptr) {
      find_cache(token, row);
    }
    if (args.residual != nullptr) {
      load_residual(0);
    }
  }

  /// scale: of the sums of rows g and g + 8.
  template <typename Sums>
  __device__ __forceinline__ void store(const Sums& sums, const float2& scale) {
    if constexpr (kParts % 2 == 1) {
      // The last part of a tile and the first of the next share a place.
      meet<kWarpgroup>(barrier_);
    }
    if (args_.activation == Activation::kNone && args_.row_scales == nullptr) {
      [&]<int... kPart>(std::integer_sequence<int, kPart...>) {
        (...,
         store_part(kPart, [&](float(&values)[kValues]) { take<kPart>(sums, scale, values); }));
      }
      (std::make_integer_sequence<int, kParts>());
      return;
    }
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      store_part(part, [&](float(&values)[kValues]) {
        const float2 factor = inside_loop(scale);
        with_index<kParts>(part, [&]<int kPart>() { take<kPart>(sums, factor, values); });
        if (args_.row_scales != nullptr) {
          scale_tokens(values, part);
        }
        activate_all(args_.activation, values);
      });
    }
  }

 private:
  using Element = typename ElementOf<T::kBFloat16>::Type;
  static constexpr int kParts = T::kTokens / kPartTokens;
  static constexpr int kValues = kPartTokens / 2;          // of a lane in a part
  static constexpr int kTokenBytes = kGroupRows * 2;       // in shared memory
  static constexpr int kChunk = 8;                         // rows of 16 bytes
  static constexpr int kChunks = kGroupRows / kChunk;      // of a token
  static constexpr int kTokenStep = kWarpgroup / kChunks;  // from a lane's chunk to its next
  static constexpr int kLoads = kPartTokens / kTokenStep;

  /// Where 16 bytes of a token are: exchanged, so that those of eight tokens meet all banks.
  __device__ static std::uint32_t chunk_offset(int token, int chunk) {
    return token * kTokenBytes + (chunk ^ token % 8) * 16;
  }
  /// Parts have two places in turn: who has met the others has read the part before the last.
  __device__ std::uint32_t place_of_part(int part) const {
    return staging_ + part % 2 * T::kPartBytes;
  }
  /// The place of this lane's first chunk in a part. The others lie behind it.
  __device__ static std::uint32_t own_chunk() {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    return chunk_offset(thread / kChunks, thread % kChunks);
  }
  /// The place of this lane's row of four transposed matrices: 0 and 1 are rows 0 to 7 and 8 to 15
  /// of eight tokens, 2 and 3 of the eight behind. Those of further tokens lie behind it.
  __device__ static std::uint32_t own_matrices() {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int lane = thread % kWarpSize;
    return chunk_offset(lane / 16 * 8 + lane % 8, thread / kWarpSize * 2 + lane / 8 % 2);
  }

  template <int kPart, typename Sums>
  __device__ __forceinline__ void take(const Sums& sums, const float2& scale,
                                       float (&values)[kValues]) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const bool upper = i % 4 / 2 == 0;
      values[i] = fmaf(sums.result(kPart * kValues + i), upper ? scale.x : scale.y,
                       upper ? bias_.x : bias_.y);
    }
  }

  template <typename Values>
  __device__ __forceinline__ void store_part(int part, const Values& take_values) {
    float values[kValues];
    take_values(values);
    const std::uint32_t place = place_of_part(part);
    std::int32_t cache_rows[kLoads];
    if (cache_rows_ != nullptr) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int token = part * kPartTokens + i * kTokenStep;
        cache_rows[i] = token < tokens_left_ ? cache_rows_[token] : -1;
      }
    }
    if (args_.residual != nullptr) {
      add_residual(values, part);
    }
#pragma unroll
    for (int i = 0; i < kPartTokens / 16; ++i) {
      std::uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        words[w] = rounded_pair<Element>(values[8 * i + 2 * w], values[8 * i + 2 * w + 1]);
      }
      store_transposed(place + own_matrices() + i * 16 * kTokenBytes, words);
    }
    meet<kWarpgroup>(barrier_);
    uint4 chunks[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      chunks[i] = load_shared_quad(place + own_chunk() + i * kTokenStep * kTokenBytes);
    }
    if (cache_rows_ != nullptr) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (cache_rows[i] >= 0) {
          *reinterpret_cast<uint4*>(place_in_cache(cache_rows[i])) = chunks[i];
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (part * kPartTokens + i * kTokenStep < tokens_left_) {
        *reinterpret_cast<uint4*>(output_) = chunks[i];
      }
      output_ += kTokenStep * args_.output_stride;
    }
  }

  /// Where this lane's rows belong if they are of a head of k or v.
  __device__ __forceinline__ void find_cache(int token, int row) {
    const DeviceQkvOutput& qkv = args_.qkv;
    const int head = row / qkv.head_dim;
    const int own = head - qkv.num_heads;
    if (own < 0) {
      return;
    }
    const bool is_key = own < qkv.num_kv_heads;
    cache_rows_ = qkv.cache_rows + token;
    output_ = static_cast<Element*>(is_key ? qkv.pages.keys : qkv.pages.values) +
              (is_key ? own : own - qkv.num_kv_heads) * kPageTokens * qkv.head_dim + row -
              head * qkv.head_dim;
  }
  __device__ __forceinline__ Element* place_in_cache(std::int32_t cache_row) const {
    constexpr auto kTokens = static_cast<std::int32_t>(kPageTokens);
    const std::int64_t page_rows =
        cache_row / kTokens * static_cast<std::int64_t>(args_.qkv.num_kv_heads * kTokens);
    return output_ + (page_rows + cache_row % kTokens) * args_.qkv.head_dim;
  }

  /// sums * scale + bias to sums * scale * row_scale + bias.
  __device__ void scale_tokens(float (&values)[kValues], int part) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int token = first_token_ + part * kPartTokens + i / 4 * 8 +
                        static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
      const float bias = i % 4 / 2 == 0 ? bias_.x : bias_.y;
      const float scale = token < args_.m ? args_.row_scales[token] : 1.0F;
      values[i] = fmaf(values[i] - bias, scale, bias);
    }
  }

  /// What is added to this lane's chunks of a part, the parts one after the other.
  __device__ __forceinline__ void load_residual(int part) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      added_[i] = uint4{};
      if (part * kPartTokens + i * kTokenStep < tokens_left_) {
        added_[i] = *reinterpret_cast<const uint4*>(residual_);
      }
      residual_ += kTokenStep * args_.residual_stride;
    }
  }

  __device__ __forceinline__ void add_residual(float (&values)[kValues], int part) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      store_shared_quad(place_of_part(part) + own_chunk() + i * kTokenStep * kTokenBytes,
                        added_[i]);
    }
    if (part + 1 < kParts) {
      load_residual(part + 1);
    }
    meet<kWarpgroup>(barrier_);
#pragma unroll
    for (int i = 0; i < kPartTokens / 16; ++i) {
      std::uint32_t words[4];
      load_transposed(place_of_part(part) + own_matrices() + i * 16 * kTokenBytes, words);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 pair = numbers_of_pair<Element>(words[w]);
        values[8 * i + 2 * w] += pair.x;
        values[8 * i + 2 * w + 1] += pair.y;
      }
    }
  }

  const DeviceLinearArgs& args_;
  std::uint32_t staging_;
  int barrier_;
  int first_token_;
  int tokens_left_;  ///< from this lane's first on
  Element* output_;  ///< of this lane's next token; of the cache, the place of row 0
  const std::int32_t* cache_rows_ = nullptr;  ///< of this lane's tokens, where there is a cache
  const Element* residual_;
  float2 bias_ = {};
  uint4 added_[kLoads] = {};
};

#endif

}  // namespace moq::kernels::cuda
