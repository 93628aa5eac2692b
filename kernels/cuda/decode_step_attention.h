#pragma once

#include "kernels/cuda/decode_step_inputs.h"
#include "kernels/cuda/decode_step_products.h"

/// One token's attention to a share of a head's keys. Device code only.
///
/// kSplits thread blocks share the keys of a head. Eight lanes have a key; a warp looks at four
/// keys, then at four more that are 4 * kWarps further, at a time. Softmax is a running one, in
/// powers of 2. The last warp of the last block also has the new token's key.
namespace moq::kernels::cuda::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

template <typename Element>
class Attention {
 public:
  __device__ __forceinline__ Attention(const KeySpan& span, Stages& stages, int warp, int lane)
      : span_(span), stages_(stages), lane_(lane), first_(warp * 4), begin_(span.begin) {
    count_ = min(kStageKeys, span_.end - begin_);
  }

  /// Waits for the first keys, before the query is there.
  __device__ __forceinline__ void begin() {
    if (count_ > 0) {
      stages_.wait();
      load();
    }
  }

  __device__ __forceinline__ void set_query(const uint4& query) {
    constexpr float kLog2E = 1.44269504F;
    constexpr float kScale = 0.125F * kLog2E;  // 1 / sqrt(kHeadDim)
    static_assert(kHeadDim == 64);
    const std::uint32_t pairs[4] = {query.x, query.y, query.z, query.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = numbers_of_pair<Element>(pairs[j]);
      query_[2 * j] = pair.x * kScale;
      query_[2 * j + 1] = pair.y * kScale;
    }
  }

  /// All keys of the cache.
  __device__ __forceinline__ void see_past() {
    constexpr int kStep = 8 * kWarps;
#pragma unroll 1
    while (count_ > 0) {
      int i = first_;
#pragma unroll 1
      while (i < count_) {
        see(i + lane_ / 8 < count_, i + kStep / 2 + lane_ / 8 < count_);
        i += kStep;
        if (i < count_) {
          load_at(i);
        }
      }
      stages_.advance();
      stages_.release();
      begin_ += kStageKeys;
      count_ = min(kStageKeys, span_.end - begin_);
      if (count_ > 0) {
        stages_.wait();
        load();
      }
    }
  }

  /// The new token's key and value.
  __device__ __forceinline__ void see_new(const uint4& key, const uint4& value) {
    keys_[0] = key;
    values_[0] = value;
    see(lane_ < 8, false);
  }

  /// Writes the warp's part: kHeadDim sums of values, the greatest score, the sum of weights.
  __device__ __forceinline__ void store(float* part) {
    float greatest = fmaxf(greatest_, __shfl_xor_sync(kWholeWarp, greatest_, 8));
    greatest = fmaxf(greatest, __shfl_xor_sync(kWholeWarp, greatest, 16));
    const float factor = fast_exp2(greatest_ - greatest);
    float total = total_ * factor;
    total += __shfl_xor_sync(kWholeWarp, total, 8);
    total += __shfl_xor_sync(kWholeWarp, total, 16);
    const bool upper = (lane_ & 8) != 0;
    float sums[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float sent = (upper ? sums_[j] : sums_[j + 4]) * factor;
      const float kept = upper ? sums_[j + 4] : sums_[j];
      sums[j] = fmaf(kept, factor, __shfl_xor_sync(kWholeWarp, sent, 8));
    }
#pragma unroll
    for (float& sum : sums) {
      sum += __shfl_xor_sync(kWholeWarp, sum, 16);
    }
    if (lane_ < 16) {
      *reinterpret_cast<float4*>(part + lane_ % 8 * 8 + (lane_ & 8) / 2) =
          make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
    if (lane_ == 0) {
      *reinterpret_cast<float2*>(part + kHeadDim) = make_float2(greatest, total);
    }
  }

 private:
  __device__ __forceinline__ void load() {
    if (first_ < count_) {
      load_at(first_);
    }
  }
  __device__ __forceinline__ void load_at(int i) {
    const std::uint32_t keys = stages_.stage + lane_ % 8 * 16;
    const std::uint32_t values = keys + count_ * kHeadBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = min(i + half * 4 * kWarps + lane_ / 8, count_ - 1);
      keys_[half] = load_shared_quad(keys + key * kHeadBytes);
      values_[half] = load_shared_quad(values + key * kHeadBytes);
    }
  }

  /// A lane's eighth of a key's product with the query.
  __device__ __forceinline__ float product(const uint4& key) const {
    const float2 a = numbers_of_pair<Element>(key.x);
    const float2 b = numbers_of_pair<Element>(key.y);
    const float2 c = numbers_of_pair<Element>(key.z);
    const float2 d = numbers_of_pair<Element>(key.w);
    return (fmaf(query_[0], a.x, query_[1] * a.y) + fmaf(query_[2], b.x, query_[3] * b.y)) +
           (fmaf(query_[4], c.x, query_[5] * c.y) + fmaf(query_[6], d.x, query_[7] * d.y));
  }

  /// Two keys, each if it exists.
  __device__ __forceinline__ void see(bool first, bool second) {
    float scores[2] = {product(keys_[0]), product(keys_[1])};
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
      scores[0] += __shfl_xor_sync(kWholeWarp, scores[0], distance);
      scores[1] += __shfl_xor_sync(kWholeWarp, scores[1], distance);
    }
    scores[0] = first ? scores[0] : kLeastScore;
    scores[1] = second ? scores[1] : kLeastScore;
    const float greatest = fmaxf(greatest_, fmaxf(scores[0], scores[1]));
    const float factor = fast_exp2(greatest_ - greatest);
    const float weights[2] = {first ? fast_exp2(scores[0] - greatest) : 0.0F,
                              second ? fast_exp2(scores[1] - greatest) : 0.0F};
    greatest_ = greatest;
    total_ = fmaf(total_, factor, weights[0] + weights[1]);
    const std::uint32_t a[4] = {values_[0].x, values_[0].y, values_[0].z, values_[0].w};
    const std::uint32_t b[4] = {values_[1].x, values_[1].y, values_[1].z, values_[1].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 x = numbers_of_pair<Element>(a[j]);
      const float2 y = numbers_of_pair<Element>(b[j]);
      sums_[2 * j] = fmaf(sums_[2 * j], factor, fmaf(weights[0], x.x, weights[1] * y.x));
      sums_[2 * j + 1] = fmaf(sums_[2 * j + 1], factor, fmaf(weights[0], x.y, weights[1] * y.y));
    }
  }

  const KeySpan& span_;
  Stages& stages_;
  int lane_;
  int first_;
  int begin_;
  int count_;
  uint4 keys_[2] = {};
  uint4 values_[2] = {};
  float query_[8];
  float greatest_ = kLeastScore;
  float total_ = 0.0F;
  float sums_[8] = {};
};

/// A head's number `column` of the warps' parts together, their greatest score and sum of weights.
struct HeadPart {
  float value;
  float greatest;
  float total;

  __device__ __forceinline__ HeadPart(const float* parts, int column)
      : greatest(kLeastScore), total(0.0F) {
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      greatest = fmaxf(greatest, parts[i * kPartStride + kHeadDim]);
    }
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const float* const part = parts + i * kPartStride;
      const float factor = fast_exp2(part[kHeadDim] - greatest);
      total = fmaf(part[kHeadDim + 1], factor, total);
      sum = fmaf(part[column], factor, sum);
    }
    value = total == 0.0F ? 0.0F : __fdividef(sum, total);  // 0: there are no keys
  }
};

#endif

}  // namespace moq::kernels::cuda::step
