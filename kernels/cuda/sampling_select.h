#pragma once

#include <cstdint>

#include "kernels/cuda/sampling_weights.h"

/// Searches over tokens by sums of integers: which keys are large enough, and which token a sum is
/// reached at. Device code only.
namespace moq::kernels::cuda {

constexpr int kDigitBits = 11;  // of a key, looked at in one pass
constexpr int kBuckets = 1 << kDigitBits;
constexpr int kFine = kWarpSize;  // buckets that are added up first
constexpr int kCoarse = kBuckets / kFine;
static_assert(kCoarse == 2 * kWarpSize, "a lane looks at two");

/// What the tokens of a block have in each bucket. Shared memory has no 64-bit additions.
struct alignas(16) Histogram {
  std::uint32_t low[kBuckets];
  std::uint32_t high[kBuckets];
  ulonglong2 coarse[kCoarse / 2];

  __device__ void clear() {
    auto* words = reinterpret_cast<uint4*>(low);  // and high
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kBuckets / 4; i += kSampleThreads) {
      words[i] = {};
    }
  }
  __device__ void add(std::uint32_t bucket, std::uint32_t count) { atomicAdd(&low[bucket], count); }
  __device__ void add(std::uint32_t bucket, Fixed fixed) {
    const Amount amount = amount_of(fixed);
    if (amount == 0) {
      return;
    }
    const auto low_part = static_cast<std::uint32_t>(amount);
    const std::uint32_t sum = atomicAdd(&low[bucket], low_part) + low_part;
    const std::uint32_t high_part =
        static_cast<std::uint32_t>(amount >> 32) + (sum < low_part ? 1 : 0);
    if (high_part != 0) {
      atomicAdd(&high[bucket], high_part);
    }
  }
  __device__ Amount amount(int bucket) const {
    return static_cast<Amount>(high[bucket]) << 32 | low[bucket];
  }
  /// To be called by all threads between two barriers.
  __device__ void add_up() {
    constexpr int kOwn = kBuckets / kSampleThreads;  // neighbouring buckets of a thread
    constexpr int kThreads = kFine / kOwn;           // neighbouring threads that add up one sum
    static_assert(kOwn % 4 == 0 && kOwn <= kFine);
    const int thread = static_cast<int>(threadIdx.x);
    Amount sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      const uint4 lows = *reinterpret_cast<const uint4*>(low + thread * kOwn + i);
      const uint4 highs = *reinterpret_cast<const uint4*>(high + thread * kOwn + i);
      sum += static_cast<Amount>(lows.x) + lows.y + lows.z + lows.w;
      sum += (static_cast<Amount>(highs.x) + highs.y + highs.z + highs.w) << 32;
    }
#pragma unroll
    for (int distance = 1; distance < kThreads; distance *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    if (thread % kThreads == 0) {
      const int i = thread / kThreads;
      (i % 2 == 0 ? coarse[i / 2].x : coarse[i / 2].y) = sum;
    }
  }
};

/// Where the keys in falling order reach a wanted amount.
struct Selection {
  std::uint32_t key;  ///< the least key that is taken
  Amount rest;        ///< what is wanted of the tokens from this key on, but for those far above it
  Amount there;  ///< what these have; if more, all of them have this key, and not all are taken
};

/// Shared memory for select. Histograms are used in turn: other blocks may still read the last one.
/// The next one is clear.
struct SelectSlots {
  Histogram histograms[2];
  std::uint32_t bucket;
  Amount before;
  Amount there;
  Amount wanted;
};

/// Finds the bucket in which `wanted_of(total)`, or slots.wanted if a pass came before, is reached.
/// By one warp, from the histograms of all blocks; `before` is what larger keys have.
template <typename Team, typename Wanted>
__device__ void find_bucket(SelectSlots& slots, Histogram& own, bool is_first, Amount before,
                            const Wanted& wanted_of) {
  const int lane = lane_index();
  Amount lower = 0;
  Amount upper = 0;
#pragma unroll
  for (int rank = 0; rank < Team::kBlocks; ++rank) {
    const ulonglong2 pair = *Team::in_block(&own.coarse[lane], rank);
    lower += pair.x;
    upper += pair.y;
  }
  Amount from_here = sum_from_lane(lower + upper);
  const Amount wanted = is_first ? wanted_of(__shfl_sync(kAllLanes, from_here, 0)) : slots.wanted;
  // The sums fall from lane to lane: the last one that reaches it.
  const auto last_lane = [](bool reaches) {
    return 31 - __clz(static_cast<int>(__ballot_sync(kAllLanes, reaches)));
  };
  int chosen = last_lane(before + from_here >= wanted);
  Amount above = before + from_here - lower - upper;
  const bool in_upper = above + upper >= wanted;
  above = __shfl_sync(kAllLanes, in_upper ? above : above + upper, chosen);
  const int coarse = __shfl_sync(kAllLanes, 2 * lane + (in_upper ? 1 : 0), chosen);

  Amount there = 0;
#pragma unroll
  for (int rank = 0; rank < Team::kBlocks; ++rank) {
    there += Team::in_block(&own, rank)->amount(coarse * kFine + lane);
  }
  from_here = sum_from_lane(there);
  chosen = last_lane(above + from_here >= wanted);
  __syncwarp();  // all lanes have read what one writes
  if (lane == chosen) {
    slots.bucket = static_cast<std::uint32_t>(coarse * kFine + lane);
    slots.before = above + from_here - there;
    slots.there = there;
    slots.wanted = wanted;
  }
}

/// The keys, in falling order, of tokens that together have an amount in [1, total].
/// @param turn       of the histograms
/// @param key_bits   key_of(token) < 2^key_bits, in [1, 32]
/// @param value_of   std::uint32_t or Fixed
/// @param wanted_of  the amount, from the total
template <typename Team, typename Key, typename Value, typename Wanted>
__device__ Selection select(SelectSlots& slots, int& turn, TokenRange range, int key_bits,
                            const Key& key_of, const Value& value_of, const Wanted& wanted_of) {
  std::uint32_t prefix = 0;
  Amount before = 0;
  int shift = key_bits;
  Selection selection{};
  do {
    const bool is_first = shift == key_bits;
    const int digit_bits = min(shift, kDigitBits);
    shift -= digit_bits;
    Histogram& histogram = slots.histograms[turn];
    turn ^= 1;
    for_each_token(range, [&](int token) {
      const std::uint32_t digits = key_of(token) >> shift;
      if (digits >> digit_bits == prefix) {
        histogram.add(digits & ((1U << digit_bits) - 1), value_of(token));
      }
    });
    __syncthreads();
    histogram.add_up();
    Team::synchronize();
    slots.histograms[turn].clear();
    if (warp_index() == 0) {
      find_bucket<Team>(slots, histogram, is_first, before, wanted_of);
    }
    __syncthreads();
    prefix = prefix << digit_bits | slots.bucket;
    before = slots.before;
    selection = {prefix << shift, slots.wanted - before, slots.there};
  } while (shift > 0 && selection.rest < selection.there);
  return selection;
}

/// Shared memory for locate.
struct LocateSlots {
  Amount warps[2][kSampleWarps];
  Amount blocks[kMaxBlocks];
};

/// The first token at which the sum of value_of over the tokens so far exceeds target_of(total),
/// which is below the total: on the one thread that finds it, -1 on all others.
template <typename Team, typename Value, typename Target>
__device__ int locate(LocateSlots& slots, TokenRange range, const Value& value_of,
                      const Target& target_of) {
  const int lane = lane_index();
  const int warp = warp_index();
  const auto sum_of = [&](int begin, int end, int step) {
    Amount sum = 0;
#pragma unroll 4
    for (int token = begin; token < end; token += step) {
      sum += amount_of(value_of(token));
    }
    return sum;
  };
  const TokenRange own = range.share(warp, kSampleWarps);
  const Amount warp_sum = sum_lanes(sum_of(own.begin + lane, own.end, kWarpSize));
  if (lane == 0) {
    slots.warps[0][warp] = warp_sum;
  }
  __syncthreads();
  const Amount in_warp = of_warp(slots.warps[0]);
  const Amount to_warp = sum_to_lane(in_warp);
  const Amount block_sum = __shfl_sync(kAllLanes, to_warp, kWarpSize - 1);
  Team::publish(slots.blocks, block_sum);
  Team::synchronize();
  Amount before = 0;
  Amount total = 0;
  for (int rank = 0; rank < Team::kBlocks; ++rank) {
    before += rank < Team::rank() ? slots.blocks[rank] : 0;
    total += slots.blocks[rank];
  }
  const Amount target = target_of(total);
  if (target < before || target - before >= block_sum) {
    return -1;
  }
  // In this block: a warp's share, dealt to all threads.
  Amount rest = target - before;
  const int chosen = __ffs(static_cast<int>(__ballot_sync(kAllLanes, to_warp > rest))) - 1;
  rest -= __shfl_sync(kAllLanes, to_warp - in_warp, chosen);
  const TokenRange part =
      range.share(chosen, kSampleWarps).share(static_cast<int>(threadIdx.x), kSampleThreads);
  const Amount sum = sum_of(part.begin, part.end, 1);
  const Amount to_thread = sum_to_lane(sum);
  if (lane == kWarpSize - 1) {
    slots.warps[1][warp] = to_thread;
  }
  __syncthreads();
  const Amount in_other = of_warp(slots.warps[1]);
  const Amount before_warp = sum_to_lane(in_other) - in_other;
  const Amount before_thread = __shfl_sync(kAllLanes, before_warp, warp) + to_thread - sum;
  if (rest < before_thread || rest - before_thread >= sum) {
    return -1;
  }
  rest -= before_thread;
  int token = part.begin;
  for (Amount amount = amount_of(value_of(token)); rest >= amount;
       amount = amount_of(value_of(token))) {
    rest -= amount;
    ++token;
  }
  return token;
}

}  // namespace moq::kernels::cuda
