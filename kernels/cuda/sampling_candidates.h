#pragma once

#include <cstdint>

#include "kernels/cuda/sampling_select.h"

/// The tokens of the largest scores of a row, gathered in one block where they are few: what top-k
/// and top-p remove need not be looked at again. Device code only.
namespace moq::kernels::cuda {

constexpr int kCandidates = 1024;     // at most
constexpr int kWarpCandidates = 128;  // of a warp's share of the tokens, at most
/// That are asked for: at most half of the threads' largest scores, and 512, as others would be far
/// below.
template <typename Team>
constexpr int kWantedCandidates =
    Team::kBlocks* kSampleThreads / 2 < 512 ? Team::kBlocks* kSampleThreads / 2 : 512;

struct Candidate {
  float score;
  int token;
};

/// Shared memory for gather_candidates.
struct CandidateSlots {
  Candidate warps[kSampleWarps][kWarpCandidates];  ///< in the order of tokens
  std::uint32_t counts[kSampleWarps];              ///< may be more than fit
  Amount totals[kSampleWarps];                     ///< of weights, candidates or not
  int size;                                        ///< of what the first block gathered; 0: nothing
  // Of the first block:
  std::uint32_t block_counts[kMaxBlocks];
  Amount block_totals[kMaxBlocks];
  std::uint32_t offsets[kMaxBlocks * kSampleWarps];  ///< behind each warp's candidates
  Amount sums[kSampleWarps];
  float scores[kCandidates];
  int tokens[kCandidates];
};

/// A key that about `count` tokens reach, at least that many: by the largest of each thread, of
/// which as many do. 0 if there is none near the best one.
template <typename Team>
__device__ std::uint32_t candidate_key(SelectSlots& slots, int& turn, Best best, std::uint32_t peak,
                                       std::uint32_t count) {
  // Keys are distances from the best: 2^11 steps of 2^16 are 16 powers of two of them.
  constexpr int kStepBits = 16;
  const Selection selection = select<Team>(
      slots, turn, {0, kSampleThreads}, kDigitBits,
      [&](int) { return kBuckets - 1 - min((best.key - peak) >> kStepBits, kBuckets - 1U); },
      [](int) { return std::uint32_t{1}; }, [&](Amount) { return Amount{count}; });
  const std::uint32_t distance = ((kBuckets - selection.key) << kStepBits) - 1;
  return selection.key == 0 || distance >= best.key ? 0 : best.key - distance;
}

/// Of this warp's share of the tokens: those from least_key on, and the sum of all weights.
template <bool kCached>
__device__ void collect_candidates(CandidateSlots& slots, const Weights<kCached>& weights,
                                   std::uint32_t least_key, bool with_total) {
  const int lane = lane_index();
  const TokenRange own = weights.range.share(warp_index(), kSampleWarps);
  std::uint32_t count = 0;
  Amount sum = 0;
#pragma unroll 4
  for (int first = own.begin; first < own.end; first += kWarpSize) {
    const int token = first + lane;
    const float score = token < own.end ? weights.score(token) : __uint_as_float(0xff800000U);
    const bool is_candidate = token < own.end && ordered_key(score) >= least_key;
    const std::uint32_t lanes = __ballot_sync(kAllLanes, is_candidate);
    const std::uint32_t place = count + __popc(lanes & ((1U << lane) - 1));
    if (is_candidate && place < kWarpCandidates) {
      slots.warps[warp_index()][place] = {score, token};
    }
    count += __popc(lanes);
    if (with_total) {
      sum += amount_of(fixed_point(weights.weight_of(score)));
    }
  }
  const Amount total = with_total ? sum_lanes(sum) : 0;
  if (lane == 0) {
    slots.counts[warp_index()] = count;
    slots.totals[warp_index()] = total;
  }
}

/// Gathers what all blocks collected in this block. Returns how many, 0 if too many.
/// @param total  receives the sum of all weights
template <typename Team>
__device__ int gather_candidates(CandidateSlots& slots, Amount& total) {
  const int lane = lane_index();
  const int warp = warp_index();
  std::uint32_t behind = 0;
  if (warp < Team::kBlocks) {  // a warp for each block, a lane for each of its warps
    const bool is_warp = lane < kSampleWarps;
    const std::uint32_t count = is_warp ? Team::in_block(slots.counts, warp)[lane] : 0;
    const bool too_many = __any_sync(kAllLanes, count > kWarpCandidates) != 0;
    behind = static_cast<std::uint32_t>(sum_to_lane(count));
    const Amount block_total = sum_lanes(is_warp ? Team::in_block(slots.totals, warp)[lane] : 0);
    if (lane == kWarpSize - 1) {
      slots.block_counts[warp] = too_many ? kCandidates + 1 : behind;
      slots.block_totals[warp] = block_total;
    }
  }
  __syncthreads();
  std::uint32_t size = 0;
  total = 0;
  for (int rank = 0; rank < Team::kBlocks; ++rank) {
    behind += rank < warp ? slots.block_counts[rank] : 0;
    size += slots.block_counts[rank];
    total += slots.block_totals[rank];
  }
  if (warp < Team::kBlocks && lane < kSampleWarps) {
    slots.offsets[warp * kSampleWarps + lane] = behind;
  }
  __syncthreads();
  if (size > kCandidates) {
    return 0;
  }
  for (std::uint32_t place = threadIdx.x; place < size; place += kSampleThreads) {
    int from = 0;  // warps whose candidates are all in front of this place
#pragma unroll
    for (int step = Team::kBlocks * kSampleWarps / 2; step > 0; step /= 2) {
      from += slots.offsets[from + step - 1] <= place ? step : 0;
    }
    const std::uint32_t before = from > 0 ? slots.offsets[from - 1] : 0;
    const Candidate candidate =
        *Team::in_block(&slots.warps[from % kSampleWarps][place - before], from / kSampleWarps);
    slots.scores[place] = candidate.score;
    slots.tokens[place] = candidate.token;
  }
  return static_cast<int>(size);
}

/// The sum of what the threads of a block have, on all of them.
__device__ inline Amount sum_threads(Amount* slots, Amount value) {
  value = sum_lanes(value);
  if (lane_index() == 0) {
    slots[warp_index()] = value;
  }
  __syncthreads();
  return sum_lanes(of_warp(slots));
}

}  // namespace moq::kernels::cuda
