#pragma once

#include "kernels/cuda/decode_step_attention.h"
#include "kernels/cuda/decode_step_inputs.h"
#include "kernels/cuda/linear_epilogue.h"

/// A layer of the decode step, as a warp that multiplies goes through it. Device code only.
namespace moq::kernels::cuda::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

/// What the warps of a thread block share.
struct SharedMemory {
  Ring* ring;
  std::uint32_t stages;
  uint4* digits;  ///< [warps][kRounds * 32]
  float* sums;    ///< [2][kSumRows][kSumStride]: the warps' sums of a row; two phases in turn
  float* parts;   ///< [warps][kPartStride]
  float2 (*moments)[8];            ///< [2][warps]: sums of differences and of their squares
  const std::int16_t (*units)[2];  ///< [projections]: this block's rows, in blocks of 16
};

template <int kRounds, typename Element>
class Layers {
  using Slots = Slot<kRounds>;
  using In = Inputs<kRounds, Element>;

 public:
  __device__ Layers(const Parameters& parameters, const SharedMemory& shared, int past,
                    std::int32_t cache_row)
      : p_(parameters),
        shared_(shared),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / kWarpSize),
        lane_(thread_ % kWarpSize),
        span_(static_cast<int>(blockIdx.x), past),
        cache_row_(cache_row),
        stages_(*shared.ring, shared.stages),
        inputs_(parameters, shared.moments),
        digits_(shared.digits + warp_ * (kRounds * kWarpSize), lane_),
        own_sums_(shared_address(shared.sums) +
                  ((lane_ / 4 + 8 * (lane_ % 4)) * kSumStride + warp_) * sizeof(float)),
        column_(thread_ / kBlockRows * kBlockRows + column_at(thread_ % kBlockRows)),
        last_round_(warp_ + kWarps * (kRounds - 1) < p_.col_blocks),
        tell_(p_.exchange + (lane_ & 3) * Slots::kCopyBytes + (thread_ >> 2) * 8),
        done_before_(*p_.layers_done) {
    if (thread_ < count(kOut) * kBlockRows) {
      residual_ = number_of(element(p_.input[first(kOut) * kBlockRows + column_]));
    }
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (layer_ = 0; layer_ < p_.layers; ++layer_) {
      const std::uint32_t n = done_before_ + layer_;
      slot_ = n % kSlots * Slots::kBytes;
      last_slot_ = (n - 1) % kSlots * Slots::kBytes;
      cleared_ = (n + kClearAhead) % kSlots * Slots::kBytes;
      project<kQkv>();
      if (span_.head < p_.heads) {
        attend();
      }
      project<kOut>();
      meet();
      project<kUp>();
      project<kDown>();
    }
    // The last block reads inner numbers of all others, which have read the count by then.
    if (blockIdx.x + 1 == gridDim.x) {
      meet();
      meet_consumers();
      if (thread_ == 0) {
        *p_.layers_done = done_before_ + p_.layers;
      }
    }
  }

 private:
  static __device__ __forceinline__ Element element(std::uint32_t bits) {
    return Element{static_cast<std::uint16_t>(bits)};
  }
  __device__ __forceinline__ int first(int projection) const {
    return shared_.units[projection][0];
  }
  __device__ __forceinline__ int count(int projection) const {
    return shared_.units[projection][1] - shared_.units[projection][0];
  }
  // ---- the projections

  /// All of a layer's projection that this thread block has rows of.
  template <int kProjection>
  __device__ __forceinline__ void project() {
    constexpr bool kDownwards = kProjection == kDown;
    constexpr bool kNorm = kProjection == kQkv || kProjection == kUp;
    const int units = count(kProjection);
    if (units == 0) {
      return;
    }
    // What can be loaded before the input is there.
    int piece = warp_;  // the first of this warp's column blocks in a piece of the row
    fragments_[0].load(stages_, piece, in_last_round(piece), lane_);
    if (kDownwards || units > 1) {
      const int second = kDownwards ? next_piece(piece) : piece;
      fragments_[1].load(stages_, second, in_last_round(second), lane_);
    }
    const float2 row = row_constants<kProjection>(units);
    typename In::Norm norm;
    if constexpr (kNorm) {
      inputs_.load_norm(norm, 2 * layer_ + (kProjection == kUp ? 1 : 0));
    }
    constexpr int kWords = kDownwards ? kRounds : In::kWords;  // kPieces times as many at most
    typename In::template Numbers<kWords> numbers;
    if constexpr (kProjection == kOut) {
      inputs_.ask_attended(numbers, slot_);
    } else if constexpr (kProjection == kQkv) {
      if (layer_ == 0) {
        inputs_.load_input(numbers);
      } else {
        inputs_.template ask_row<kWords>(numbers, last_slot_ + Slots::kEnd, p_.col_blocks);
      }
    } else if constexpr (kProjection == kUp) {
      inputs_.template ask_row<kWords>(numbers, slot_ + Slots::kMiddle, p_.col_blocks);
    } else {
      inputs_.template ask_row<kWords>(numbers, slot_ + Slots::kInner, kPieces * p_.col_blocks);
    }
    if constexpr (kNorm) {
      inputs_.normalise(numbers, norm);
    }
    digits_.write(numbers, lane_);
    if constexpr (kDownwards) {
      multiply_wide(piece);
    } else {
      multiply_rows(units);
    }
    meet_consumers();
    if (warp_ * kWarpSize < units * kBlockRows) {
      finish<kProjection>(units, row);
    }
    turn_ ^= 1;
  }

  __device__ __forceinline__ bool in_last_round(int first_block) const {
    return first_block + kWarps * (kRounds - 1) < p_.col_blocks;
  }
  /// Column blocks of a wide row are taken in turn through all its pieces.
  __device__ __forceinline__ int next_piece(int first_block) const {
    const int next = first_block - p_.col_blocks % kWarps;
    return next < 0 ? next + kWarps : next;
  }
  __device__ __forceinline__ std::uint32_t sums_of_turn() const {
    return own_sums_ + turn_ * (kSumRows * kSumStride * static_cast<int>(sizeof(float)));
  }

  /// Units of 16 rows, two of which are in registers.
  __device__ __forceinline__ void multiply_rows(int units) {
    std::uint32_t target = sums_of_turn();
    std::uint32_t digits[kRounds][2];
    load_digits(digits, digits_.fragment, last_round_);
#pragma unroll 1
    for (int u = 0; u < units; u += 2) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (u + e < units) {
          int sums[4] = {};
          fragments_[e].multiply(sums, digits, last_round_);
          stages_.release();
          if (u + e + 2 < units) {
            fragments_[e].load(stages_, warp_, last_round_, lane_);
          }
          digits_.store_sums(sums, lane_, target);
          target += kBlockRows * kSumStride * static_cast<int>(sizeof(float));
        }
      }
    }
  }

  /// The pieces of one unit's rows, two of which are in registers.
  __device__ __forceinline__ void multiply_wide(int piece) {
    constexpr int kBytes = kBlockWords * 16;
    int sums[4] = {};
    std::uint32_t digits[kRounds][2];
    std::uint32_t from = digits_.fragment;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const bool last_round = in_last_round(piece);
      load_digits(digits, from, last_round);
      fragments_[j & 1].multiply(sums, digits, last_round);
      stages_.release();
      from += (last_round ? kRounds : kRounds - 1) * kBytes;
      piece = next_piece(piece);
      if (j + 2 < kPieces) {
        const int following = next_piece(piece);
        fragments_[j & 1].load(stages_, following, in_last_round(following), lane_);
      }
    }
    digits_.store_sums(sums, lane_, sums_of_turn());
  }

  // ---- results

  /// Scale and bias of the row that this thread finishes.
  template <int kProjection>
  __device__ __forceinline__ float2 row_constants(int units) const {
    if (thread_ >= units * kBlockRows) {
      return {0.0F, 0.0F};
    }
    const float2* const rows =
        p_.rows +
        static_cast<std::int64_t>(layer_ * kLayerRows + first_row(kProjection)) * p_.hidden;
    return rows[first(kProjection) * kBlockRows + own_row<kProjection>()];
  }
  /// Rows of q, k and v lie in their own order, others as the next product wants its columns.
  template <int kProjection>
  __device__ __forceinline__ int own_row() const {
    return kProjection == kQkv ? thread_ : column_;
  }
  /// The sum of the warps' sums.
  __device__ __forceinline__ float sum_of_row(int row) const {
    const auto* const sums = reinterpret_cast<const float4*>(
        shared_.sums + turn_ * (kSumRows * kSumStride) + row * kSumStride);
    const float4 a = sums[0];
    const float4 b = sums[1];  // the last is 0
    static_assert(kWarps <= 8);
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  }

  template <int kProjection>
  __device__ __forceinline__ void finish(int units, const float2& row) {
    const bool mine = thread_ < units * kBlockRows;
    float value = fmaf(sum_of_row(own_row<kProjection>()), row.x, row.y);
    const int bytes = first(kProjection) * kBlockRows * 2;  // where the rows begin
    if constexpr (kProjection == kQkv) {
      const uint2 word = word_of_lanes(told<Element>(value), lane_);
      if (mine && (lane_ & 3) == 0) {
        tell_and_clear(tell_ + Slots::kQkv + bytes, slot_, cleared_, word);
        append(first(kProjection) * kBlockRows + thread_ - p_.hidden, word);
      }
      return;
    }
    if constexpr (kProjection == kUp) {
      value = activate(p_.activation, value);
    } else {
      value += residual_;
    }
    const std::uint32_t bits = told<Element>(value);
    const uint2 word = word_of_lanes(bits, lane_);
    if constexpr (kProjection != kUp) {
      residual_ = number_of(element(bits));
    }
    constexpr int kPart = kProjection == kOut  ? Slots::kMiddle
                          : kProjection == kUp ? Slots::kInner
                                               : Slots::kEnd;
    static_assert(kCopies == 4);  // each of the four lanes that have a word writes one
    if (mine) {
      char* const address = tell_ + kPart + bytes;
      if (kProjection == kDown && layer_ + 1 == p_.layers) {
        p_.output[first(kProjection) * kBlockRows + column_] = static_cast<std::uint16_t>(bits);
        tell(address + cleared_, {kClear, kClear});
      } else {
        tell_and_clear(address, slot_, cleared_, word);
      }
    }
  }

  /// Four columns of the new token's key or value; `row` counts from the first one of k.
  __device__ __forceinline__ void append(int row, const uint2& word) const {
    if (row < 0 || cache_row_ < 0) {
      return;
    }
    const bool is_key = row < p_.hidden;
    const int column = is_key ? row : row - p_.hidden;
    constexpr int kPage = static_cast<int>(kPageTokens);
    const std::int64_t token =
        (static_cast<std::int64_t>(cache_row_ / kPage) * p_.heads + column / kHeadDim) * kPage +
        cache_row_ % kPage;
    *reinterpret_cast<uint2*>((is_key ? p_.keys : p_.values) + layer_ * p_.cache_stride +
                              token * kHeadDim + column % kHeadDim) = word;
  }

  // ---- attention

  __device__ __forceinline__ void attend() {
    Attention<Element> attention(span_, stages_, warp_, lane_);
    attention.begin();
    const char* const query =
        p_.exchange + slot_ + Slots::kQkv + span_.head * kHeadBytes + lane_ % 8 * 16;
    uint4 key;
    uint4 value;
    inputs_.ask_pairs(key, query, value, nullptr);
    attention.set_query(key);
    attention.see_past();
    if (span_.split == kSplits - 1 && warp_ == kWarps - 1) {
      inputs_.ask_pairs(key, query + p_.hidden * 2, value, query + p_.hidden * 4);
      attention.see_new(key, value);
    }
    attention.store(shared_.parts + warp_ * kPartStride);
    meet_consumers();
    if (thread_ < kHeadDim) {
      const HeadPart part(shared_.parts, column_);
      const uint2 word = word_of_lanes(told<Element>(part.value), lane_);
      tell_and_clear(tell_ + Slots::kAttended + span_.split * Slots::kRow + span_.head * kHeadBytes,
                     slot_, cleared_, word);
      if (thread_ < kCopies) {
        tell_and_clear(p_.exchange + thread_ * Slots::kCopyBytes + Slots::kShares +
                           (span_.head * kSplits + span_.split) * 8,
                       slot_, cleared_, {told_float(part.greatest), told_float(part.total)});
      }
    }
  }

  const Parameters& p_;
  const SharedMemory& shared_;
  int thread_;
  int warp_;
  int lane_;
  KeySpan span_;
  std::int32_t cache_row_;
  Stages stages_;
  In inputs_;
  Digits digits_;
  std::uint32_t own_sums_;
  int column_;
  bool last_round_;
  char* tell_;  // where this thread tells the word of its row, and its copy
  std::uint32_t done_before_;
  Fragments<kRounds> fragments_[2];
  int layer_ = 0;
  std::uint32_t slot_ = 0;
  std::uint32_t last_slot_ = 0;
  std::uint32_t cleared_ = 0;
  int turn_ = 0;
  float residual_ = 0.0F;
};

#endif

}  // namespace moq::kernels::cuda::step
