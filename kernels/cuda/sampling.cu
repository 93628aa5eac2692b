// The next token of each row of logits. A cluster of eight thread blocks takes a row (compute
// capability 9.0; one block where the vocabulary is small or the GPU older), each an eighth of the
// vocabulary, so that one row does not wait for one multiprocessor.
//
// Nothing is sorted. The k-th largest score and the weight at which top-p is reached are found by
// their bits, eleven at a time, from histograms of counts and of weights; the drawn token by its
// place in the sums of the weights. Where top-k or top-p are sure to keep tokens of the largest few
// hundred scores only, all this is done by one block on those. Weights are added in fixed point, in
// any order, and are the same floats as on the CPU, so that blocks, threads and batches have no
// influence on what is drawn.
#include <cuda_runtime.h>

#include "kernels/common/check.h"
#include "kernels/common/integer_math.h"
#include "kernels/common/philox.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sampling_candidates.h"
#include "kernels/cuda/sampling_select.h"
#include "kernels/cuda/sampling_team.h"
#include "kernels/cuda/sampling_weights.h"
#include "kernels/sampling.h"

namespace moq::kernels::cuda {
namespace {

constexpr int kClusterBlocks = 8;
/// Up to here a row is one block's work.
constexpr std::int64_t kOneBlockVocabulary = 4096;

// -------------------------------------------------------------------------------- device functions

__device__ const std::uint32_t* seen_row(const DeviceSamplingArgs& args, std::int64_t row) {
  return args.seen + args.rows[row].history_row * ((args.vocab_size + 31) / 32);
}

/// Writes the row's token. By one thread, after all have read what the row has seen.
__device__ void finish(const DeviceSamplingArgs& args, std::int64_t row, int token) {
  args.tokens[row] = token;
  if (args.seen != nullptr && token != DeviceSamplingArgs::kNoToken) {
    atomicOr(const_cast<std::uint32_t*>(seen_row(args, row)) + token / 32, 1U << (token % 32));
  }
}

/// The largest integer that is not above u * total, u in [0, 1) being 53 random bits of the row's
/// step.
__device__ Amount quantile(const DeviceSamplingRow& row, Amount total) {
  const PhiloxBlock random =
      philox4x32({{static_cast<std::uint32_t>(row.step), static_cast<std::uint32_t>(row.step >> 32),
                   row.stream, 0}},
                 row.params.seed);
  const Amount bits = (static_cast<Amount>(random.word[0]) << 32 | random.word[1]) >> 11;
  return __umul64hi(bits, total) << 11 | (bits * total) >> 53;
}

using OneBlock = Team<1>;

struct SampleSlots {
  BestSlots best;
  SelectSlots select;
  CandidateSlots candidates;
  LocateSlots ties;
  LocateSlots draw;
  int last_tied;
};
constexpr std::size_t kSlotBytes = (sizeof(SampleSlots) + 15) / 16 * 16;

/// Which tokens top-p and min-p keep.
struct Kept {
  std::uint32_t least_bits = 0;  ///< of the weight
  int last_tied = 0x7fffffff;    ///< token of that weight
  float least_weight = 0.0F;

  __device__ Fixed fixed(float weight, int token) const {
    const std::uint32_t bits = __float_as_uint(weight);
    const bool is_kept =
        weight >= least_weight && (bits > least_bits || (bits == least_bits && token <= last_tied));
    return fixed_point(is_kept ? weight : 0.0F);
  }
};

/// What top-p wants of a total, at least 1.
__device__ Amount share_of(float top_p, Amount total) {
  return static_cast<Amount>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

/// @param total  of the weights; 0: of those in `weights`
template <typename Team, bool kCached>
__device__ Kept keep_top_p(SampleSlots& slots, int& turn, const Weights<kCached>& weights,
                           float top_p, Amount total) {
  constexpr int kWeightBits = 30;  // of a float that is at most 1
  const auto bits_of = [&](int token) { return __float_as_uint(weights.weight(token)); };
  const Selection top = select<Team>(
      slots.select, turn, weights.range, kWeightBits, bits_of,
      [&](int token) { return fixed_point(weights.weight(token)); },
      [&](Amount own_total) { return share_of(top_p, total != 0 ? total : own_total); });
  Kept kept{.least_bits = top.key};
  if (top.rest < top.there) {  // some of the tokens of this weight, lowest first
    const Amount each = amount_of(fixed_point(__uint_as_float(top.key)));
    const Amount count = (top.rest + each - 1) / each;
    const int last = locate<Team>(
        slots.ties, weights.range, [&](int token) { return bits_of(token) == top.key ? 1U : 0U; },
        [&](Amount) { return count - 1; });
    if (last >= 0) {
      for (int rank = 0; rank < Team::kBlocks; ++rank) {
        *Team::in_block(&slots.last_tied, rank) = last;
      }
    }
    Team::synchronize();
    kept.last_tied = slots.last_tied;
  }
  return kept;
}

/// Draws from the tokens of `weights`: on the one thread that finds it, -1 on all others.
/// @param top_k      below their number; 0: all
/// @param base_key   no score has a lesser one
/// @param best_key   nor a larger one
/// @param total      of the weights, for top-p; 0: of those in `weights` that top-k keeps
template <typename Team, bool kCached>
__device__ int draw(SampleSlots& slots, int& turn, Weights<kCached> weights,
                    const DeviceSamplingRow& row, std::int64_t top_k, std::uint32_t base_key,
                    std::uint32_t best_key, Amount total) {
  if (top_k > 0) {
    const Selection top = select<Team>(
        slots.select, turn, weights.range,
        max(1, 32 - __clz(static_cast<int>(best_key - base_key))),
        [&](int token) { return ordered_key(weights.score(token)) - base_key; },
        [](int) { return 1U; }, [&](Amount) { return static_cast<Amount>(top_k); });
    weights.least_key = base_key + top.key;
  }
  Kept kept;
  const bool removes_tail = row.params.top_p < 1.0F;
  if (removes_tail) {
    weights.fix();
    kept = keep_top_p<Team>(slots, turn, weights, row.params.top_p, total);
  }
  kept.least_weight = row.params.min_p;
  return locate<Team>(
      slots.draw, weights.range,
      [&](int token) {
        return kept.fixed(
            removes_tail ? weights.weight(token) : weights.weight_of(weights.score(token)), token);
      },
      [&](Amount sum) { return quantile(row, sum); });
}

// ----------------------------------------------------------------------------------------- kernels

/// Greedy rows without a penalty.
template <typename Team>
__global__ void __launch_bounds__(kSampleThreads) greedy_kernel(DeviceSamplingArgs args) {
  __shared__ BestSlots slots;
  const std::int64_t row = blockIdx.x / Team::kBlocks;
  allow_next_kernel();
  Team::synchronize();
  wait_for_previous_kernels();
  const Scores scores{args.logits + row * args.logits_stride, nullptr, 1.0F};
  const TokenRange all{0, static_cast<int>(args.vocab_size)};
  std::uint32_t peak;
  const Best best = find_best<Team>(slots, all.share(Team::rank(), Team::kBlocks), scores, peak);
  if (Team::rank() == 0 && threadIdx.x == 0) {
    finish(args, row, best.exists() ? static_cast<int>(best.token) : DeviceSamplingArgs::kNoToken);
  }
}

/// @tparam kCached  whether a block's weights fit into its shared memory
template <typename Team, bool kCached>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(DeviceSamplingArgs args) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& slots = *reinterpret_cast<SampleSlots*>(memory);
  const std::int64_t index = blockIdx.x / Team::kBlocks;
  allow_next_kernel();
  slots.select.histograms[0].clear();
  Team::synchronize();
  wait_for_previous_kernels();
  const DeviceSamplingRow row = args.rows[index];
  const SamplingParams& params = row.params;
  const bool has_penalty = args.seen != nullptr && params.repetition_penalty != 1.0F;
  const TokenRange all{0, static_cast<int>(args.vocab_size)};
  Weights<kCached> weights{
      {args.logits + index * args.logits_stride, has_penalty ? seen_row(args, index) : nullptr,
       params.repetition_penalty},
      all.share(Team::rank(), Team::kBlocks),
      reinterpret_cast<float*>(memory + kSlotBytes)};

  std::uint32_t peak;
  const Best best = find_best<Team>(
      slots.best, weights.range,
      [&](int token) {
        const float score = weights.scores(token);
        if constexpr (kCached) {
          weights.cache[token - weights.range.begin] = score;
        }
        return score;
      },
      peak);
  if (!best.exists() || params.temperature == 0.0F) {
    if (Team::rank() == 0 && threadIdx.x == 0) {
      finish(args, index,
             best.exists() ? static_cast<int>(best.token) : DeviceSamplingArgs::kNoToken);
    }
    return;
  }
  weights.largest = float_of_key(best.key);
  weights.temperature = params.temperature;
  const std::int64_t top_k = params.top_k < args.vocab_size ? params.top_k : 0;
  int turn = 0;
  constexpr int kWanted = kWantedCandidates<Team>;
  if (top_k > 0 ? top_k <= kWanted : params.top_p < 1.0F) {
    CandidateSlots& candidates = slots.candidates;
    const auto wanted = static_cast<std::uint32_t>(top_k > 0 ? top_k : kWanted);
    const std::uint32_t least_key = candidate_key<Team>(slots.select, turn, best, peak, wanted);
    collect_candidates(candidates, weights, least_key, top_k == 0);
    Team::synchronize();
    Amount total = 0;
    int size = 0;
    if (Team::rank() == 0) {
      size = gather_candidates<Team>(candidates, total);
      if (top_k == 0) {
        // What top-p keeps must be among them, and above the others even if these are rounded up.
        const float others = weights.weight_of(float_of_key(least_key)) * (1.0F + 0x1p-20F);
        Amount own = 0;
        for (int i = static_cast<int>(threadIdx.x); i < size; i += kSampleThreads) {
          const float weight = weights.weight_of(candidates.scores[i]);
          own += amount_of(fixed_point(weight > others ? weight : 0.0F));
        }
        const Amount above = sum_threads(candidates.sums, own);
        size = above >= share_of(params.top_p, total) ? size : 0;
      }
      if (threadIdx.x < Team::kBlocks) {
        *Team::in_block(&candidates.size, static_cast<int>(threadIdx.x)) = size;
      }
    }
    Team::synchronize();
    if (candidates.size > 0) {
      if (Team::rank() == 0) {
        const Weights<true> few{
            weights.scores, {0, size}, candidates.scores, weights.largest, weights.temperature};
        const int place = draw<OneBlock>(slots, turn, few, row, top_k < size ? top_k : 0, least_key,
                                         best.key, total);
        if (place >= 0) {
          finish(args, index, candidates.tokens[place]);
        }
      }
      return;
    }
  }
  const int token = draw<Team>(slots, turn, weights, row, top_k, 0, best.key, 0);
  if (token >= 0) {
    finish(args, index, token);
  }
}

// --------------------------------------------------------------------------------------- launchers

void check(const DeviceSamplingArgs& args) {
  MOQ_CHECK(args.batch_size >= 0 && args.batch_size <= 0x7fffffff / kClusterBlocks,
            "sample: batch_size must be in [0, ", 0x7fffffff / kClusterBlocks, "], got ",
            args.batch_size);
  constexpr std::int64_t kMost = DeviceSamplingArgs::kMaxVocabulary;  // for sums of Fixed
  MOQ_CHECK(args.vocab_size >= 1 && args.vocab_size <= kMost, "sample: vocab_size must be in [1, ",
            kMost, "], got ", args.vocab_size);
  if (args.batch_size == 0) {
    return;
  }
  MOQ_CHECK(args.logits != nullptr && args.tokens != nullptr,
            "sample: logits and tokens must not be null");
  MOQ_CHECK(args.rows != nullptr || (args.all_greedy && args.seen == nullptr),
            "sample: rows must not be null");
  MOQ_CHECK(args.batch_size == 1 || args.logits_stride >= args.vocab_size,
            "sample: logits_stride must be >= vocab_size, got ", args.logits_stride, " and ",
            args.vocab_size);
}

/// Starts kBlocks blocks for each row, in a cluster.
template <int kBlocks>
void launch_blocks(void (*kernel)(DeviceSamplingArgs), const DeviceSamplingArgs& args,
                   std::size_t shared_bytes, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.batch_size * kBlocks));
  if constexpr (kBlocks == 1) {
    launch(kernel, grid, dim3(kSampleThreads), shared_bytes, stream, args);
  } else {
    MOQ_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kBlocks, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kSampleThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = kernels_may_overlap() ? 2 : 1;
    launch_kernel(config, kernel, args);
  }
}

template <int kBlocks>
void sample_by(const DeviceSamplingArgs& args, cudaStream_t stream) {
  using Blocks = Team<kBlocks>;
  if (args.all_greedy) {
    return launch_blocks<kBlocks>(greedy_kernel<Blocks>, args, 0, stream);
  }
  const auto cache_bytes = static_cast<std::size_t>(divide_up(args.vocab_size, kBlocks) * 4);
  fits_in_shared(static_cast<std::int64_t>(kSlotBytes + cache_bytes))
      ? launch_blocks<kBlocks>(sample_kernel<Blocks, true>, args, kSlotBytes + cache_bytes, stream)
      : launch_blocks<kBlocks>(sample_kernel<Blocks, false>, args, kSlotBytes, stream);
}

}  // namespace

void sample(const DeviceSamplingArgs& args, cudaStream_t stream) {
  check(args);
  if (args.batch_size == 0) {
    return;
  }
  const bool one_block = args.vocab_size <= kOneBlockVocabulary ||
                         architecture_of(greedy_kernel<Team<kClusterBlocks>>) < 90;
  one_block ? sample_by<1>(args, stream) : sample_by<kClusterBlocks>(args, stream);
}

}  // namespace moq::kernels::cuda
