#pragma once

#include <cstdint>

#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/linear_wgmma_store.h"
#include "kernels/cuda/linear_wgmma_tile.h"
#include "kernels/cuda/vectors.h"

/// What wgmma_linear does with finished sums that do not go to the output as they are. Device code
/// only.
///
/// They cross shared memory as float32, so that a lane gets four neighbouring rows of a token, the
/// same rows of every token that it writes. Where these rows do not lie as they must to be accessed
/// at once, linear_epilogue.h writes them two by two. A float32 output may lie anywhere: it is then
/// written one by one.
namespace moq::kernels::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kQuad = 4;                         // rows of a lane
constexpr int kQuads = kGroupRows / kQuad;       // of a token
constexpr int kTokenStep = kWarpgroup / kQuads;  // from one token of a lane to the next

/// Four elements in one access.
template <typename Element>
__device__ inline void store_quad(Element* to, std::uint32_t first, std::uint32_t second) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(first), "r"(second) : "memory");
}

/// Writes up to kMost tokens of each lane at once.
template <bool kBFloat16, int kMost>
class WgmmaWriter {
 public:
  __device__ WgmmaWriter(const DeviceLinearArgs& args, std::int64_t n, int first_token,
                         int first_row)
      : args_(args), n_(n) {
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    token_ = first_token + thread / kQuads;
    row_ = first_row + thread % kQuads * kQuad;
    quads_ = row_ + kQuad <= n && takes_quads();
    if (quads_ && args.bias != nullptr) {
      const uint2 bits =
          *reinterpret_cast<const uint2*>(static_cast<const Element*>(args.bias) + row_);
      bias_[0] = numbers_of_pair<Element>(bits.x);
      bias_[1] = numbers_of_pair<Element>(bits.y);
    }
  }

  /// Loads what is added to the next tokens of the tile that the lane writes, of [first, end).
  __device__ __forceinline__ void load(int first, int end) {
    if (!quads_ || args_.residual == nullptr) {
      return;
    }
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      added_[u] = uint2{};
      if (first + u * kTokenStep < end && exists(first, u)) {
        added_[u] =
            *reinterpret_cast<const uint2*>(static_cast<const Element*>(args_.residual) +
                                            token_at(first, u) * args_.residual_stride + row_);
      }
    }
  }

  /// Writes the tokens from `first` on, of which this lane has four rows each.
  template <int kCount>
  __device__ __forceinline__ void write(int first, const float4 (&fours)[kCount]) const {
    static_assert(kCount <= kMost);
    if (!quads_) {
      write_pairs(first, fours);
      return;
    }
    float even[2 * kCount];  // rows 0 and 2 of each four, the gates of a gated layer
    float odd[2 * kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const float scale = args_.row_scales != nullptr && exists(first, u)
                              ? args_.row_scales[token_at(first, u)]
                              : 1.0F;
      even[2 * u] = fmaf(fours[u].x, scale, bias_[0].x);
      odd[2 * u] = fmaf(fours[u].y, scale, bias_[0].y);
      even[2 * u + 1] = fmaf(fours[u].z, scale, bias_[1].x);
      odd[2 * u + 1] = fmaf(fours[u].w, scale, bias_[1].y);
    }
    if (args_.qkv.head_dim > 0) {
      RowInputs<Element> place;
      place.load_constants(args_, n_, row_);
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        if (exists(first, u)) {
          write_qkv(place, token_at(first, u), even[2 * u], odd[2 * u], even[2 * u + 1],
                    odd[2 * u + 1]);
        }
      }
      return;
    }
    activate_all(args_.activation, even);
    auto* output = static_cast<Element*>(args_.output) + token_at(first, 0) * args_.output_stride;
    const std::int64_t step = kTokenStep * args_.output_stride;
    if (args_.gated) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        if (exists(first, u)) {
          *reinterpret_cast<std::uint32_t*>(output + u * step + row_ / 2) =
              rounded_pair<Element>(even[2 * u] * odd[2 * u], even[2 * u + 1] * odd[2 * u + 1]);
        }
      }
      return;
    }
    activate_all(args_.activation, odd);
    if (args_.float32_output) {
      write_floats<kCount>(first, even, odd);
      return;
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (exists(first, u)) {
        const float2 added[2] = {numbers_of_pair<Element>(added_[u].x),
                                 numbers_of_pair<Element>(added_[u].y)};
        store_quad(
            output + u * step + row_,
            rounded_pair<Element>(even[2 * u] + added[0].x, odd[2 * u] + added[0].y),
            rounded_pair<Element>(even[2 * u + 1] + added[1].x, odd[2 * u + 1] + added[1].y));
      }
    }
  }

 private:
  using Element = typename ElementOf<kBFloat16>::Type;

  __device__ std::int64_t token_at(int first, int u) const {
    return token_ + first + u * kTokenStep;
  }
  __device__ bool exists(int first, int u) const {
    return token_at(first, u) < args_.m;
  }

  /// Whether four rows of all that is read, and written other than as float32, can be accessed at
  /// once.
  __device__ bool takes_quads() const {
    const auto aligned = [](const void* pointer, unsigned bytes) {
      return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
    };
    if (args_.float32_output) {
      return !args_.gated && aligned(args_.bias, 8);
    }
    const int output_quad = args_.gated ? kQuad / 2 : kQuad;
    const DeviceQkvOutput& qkv = args_.qkv;
    return aligned(args_.bias, 8) && aligned(args_.residual, 8) &&
           args_.residual_stride % kQuad == 0 && aligned(args_.output, 2 * output_quad) &&
           args_.output_stride % output_quad == 0 && qkv.head_dim % kQuad == 0 &&
           qkv.rotary.rotary_dim % kQuad == 0 && aligned(qkv.rotary.cos, 8) &&
           aligned(qkv.rotary.sin, 8) && aligned(qkv.pages.keys, 8) && aligned(qkv.pages.values, 8);
  }

  /// Four rows of each token, at once where the output allows it.
  template <int kCount>
  __device__ __forceinline__ void write_floats(int first, const float (&even)[2 * kCount],
                                               const float (&odd)[2 * kCount]) const {
    auto* const output = static_cast<float*>(args_.output);
    const bool at_once = reinterpret_cast<std::uintptr_t>(output) % sizeof(float4) == 0 &&
                         args_.output_stride % kQuad == 0;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (!exists(first, u)) {
        continue;
      }
      float* const to = output + token_at(first, u) * args_.output_stride + row_;
      const float4 four = {even[2 * u], odd[2 * u], even[2 * u + 1], odd[2 * u + 1]};
      if (at_once) {
        *reinterpret_cast<float4*>(to) = four;
      } else {
        to[0] = four.x;
        to[1] = four.y;
        to[2] = four.z;
        to[3] = four.w;
      }
    }
  }

  template <int kCount>
  __device__ void write_pairs(int first, const float4 (&fours)[kCount]) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float sums[2] = {fours[u].x, fours[u].y};
#pragma unroll 1
      for (std::int64_t row = row_; row < min(row_ + kQuad, n_) && exists(first, u); row += 2) {
        const std::int64_t token = token_at(first, u);
        finish_pair<Element>(args_, row + 1 < n_, sums,
                             load_pair_inputs<Element>(args_, n_, token, row));
        sums[0] = fours[u].z;
        sums[1] = fours[u].w;
      }
    }
  }

  /// Rotates two pairs of a head of q or k, and writes them to the output or to the cache.
  __device__ void write_qkv(const RowInputs<Element>& place, std::int64_t token, float a0, float b0,
                            float a1, float b1) const {
    const DeviceQkvOutput& qkv = args_.qkv;
    auto* head = static_cast<Element*>(args_.output) + token * args_.output_stride +
                 static_cast<std::int64_t>(place.head) * qkv.head_dim;
    if (qkv.pages.keys != nullptr && place.head >= qkv.num_heads) {
      head = cache_head<Element>(qkv, place.head, qkv.cache_rows[token]);
      if (head == nullptr) {
        return;
      }
    }
    if (!place.rotated) {
      store_quad(head + place.head_row, rounded_pair<Element>(a0, b0),
                 rounded_pair<Element>(a1, b1));
      return;
    }
    const std::int64_t angle =
        static_cast<std::int64_t>(qkv.rotary.positions[token]) * (qkv.rotary.rotary_dim / 2) +
        place.head_row / 2;
    const float2 cosine = *reinterpret_cast<const float2*>(qkv.rotary.cos + angle);
    const float2 sine = *reinterpret_cast<const float2*>(qkv.rotary.sin + angle);
    *reinterpret_cast<std::uint32_t*>(head + place.head_row / 2) =
        rounded_pair<Element>(a0 * cosine.x - b0 * sine.x, a1 * cosine.y - b1 * sine.y);
    *reinterpret_cast<std::uint32_t*>(head + place.head_row / 2 + qkv.rotary.rotary_dim / 2) =
        rounded_pair<Element>(b0 * cosine.x + a0 * sine.x, b1 * cosine.y + a1 * sine.y);
  }

  const DeviceLinearArgs& args_;
  std::int64_t n_;
  std::int64_t token_;
  std::int64_t row_;
  bool quads_;
  float2 bias_[2] = {};
  uint2 added_[kMost] = {};
};

/// Sums of kCount tokens, scaled, to shared memory: [token, row]. `sum`: sum(i) of a lane.
template <typename T, int kCount, typename Sum>
__device__ __forceinline__ void put_results(float* results, const Sum& sum, const float2& scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
  float* own = results + lane % 4 * 2 * T::kResultStride + warp * kBlockRows + lane / 4;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const bool upper = i % 4 / 2 == 0;
    own[(i / 4 * 8 + i % 2) * T::kResultStride + (upper ? 0 : 8)] =
        sum(i) * (upper ? scale.x : scale.y);
  }
}

/// All that a warpgroup has, some tokens at a time.
template <typename T, typename Sums>
__device__ __forceinline__ void write_results(const DeviceLinearArgs& args, std::int64_t n,
                                              int first_token, int first_row, float* results,
                                              const Sums& sums, const float2& scale, int barrier) {
  constexpr int kCount = kPartTokens / kTokenStep;
  WgmmaWriter<T::kBFloat16, kCount> writer(args, n, first_token, first_row);
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const float* own = results + thread / kQuads * T::kResultStride + thread % kQuads * kQuad;
#pragma unroll 1
  for (int first = 0; first < T::kTokens; first += kPartTokens) {
    writer.load(first, T::kTokens);
    meet<kWarpgroup>(barrier);  // what was there is written
    const float2 factor = inside_loop(scale);
    with_index<T::kTokens / kPartTokens>(first / kPartTokens, [&]<int kPart>() {
      put_results<T, kPartTokens>(
          results, [&](int i) { return sums.result(kPart * kPartTokens / 2 + i); }, factor);
    });
    meet<kWarpgroup>(barrier);
    float4 fours[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      fours[u] = *reinterpret_cast<const float4*>(own + u * kTokenStep * T::kResultStride);
    }
    writer.write(first, fours);
  }
}

#endif

}  // namespace moq::kernels::cuda
