#pragma once

#include <cstdint>

struct CUstream_st;

namespace moq::kernels {

/// How the next token of one row is chosen. The defaults leave the model's distribution as it is.
struct SamplingParams {
  float temperature = 1.0F;  ///< >= 0; 0: greedy, the largest logit, ties to the lowest index
  std::int64_t top_k = 0;    ///< keep the k largest logits and what ties with the last; 0: all
  float top_p = 1.0F;        ///< in (0, 1]: keep the fewest tokens that reach this probability
  float min_p = 0.0F;        ///< in [0, 1]: drop below this share of the largest probability
  float repetition_penalty = 1.0F;  ///< > 0: logits of tokens in the history are divided by it if
                                    ///< positive, multiplied if negative
  std::uint64_t seed = 0;
};

/// @throws moq::Error naming the first parameter that is out of range
void check(const SamplingParams& params);

/// One row of a sampling batch.
struct SamplingRow {
  SamplingParams params;
  const std::int64_t* history = nullptr;  ///< [history_length]: the tokens before, prompt included
  std::int64_t history_length = 0;
  std::uint32_t stream = 0;  ///< separates rows that share a seed
  std::uint64_t step = 0;    ///< number of the token being drawn
};

/// Draws one token per row. Processors apply in the order of Hugging Face's generate(), each on the
/// result of the one before: repetition penalty, temperature, top-k, top-p, min-p; at least one
/// token is always kept. Greedy rows apply the repetition penalty only.
///
/// top-p keeps a token while the tokens of larger probability together have less than top_p; equal
/// probabilities rank by index, lowest first.
///
/// The draw inverts the distribution function over the kept tokens in index order, at the uniform
/// that Philox4x32-10 gives for key = seed, counter = {step low, step high, stream, 0}: it depends
/// on nothing outside the row. Probabilities are float32, their sums float64.
struct SamplingArgs {
  const float* logits;      ///< [batch_size, vocab_size], rows logits_stride apart
  std::int64_t batch_size;  ///< >= 0
  std::int64_t vocab_size;  ///< >= 1
  std::int64_t logits_stride;
  const SamplingRow* rows;         ///< [batch_size]
  std::int64_t* tokens = nullptr;  ///< [batch_size], the drawn tokens; null: not drawn
  /// [batch_size, vocab_size], contiguous: the distribution drawn from, 0 where a token is removed
  /// (greedy: 1 at the chosen one); null: not written
  float* probabilities = nullptr;
};

namespace cpu {
/// @throws moq::Error if a parameter or a token of a history is out of range, if both outputs are
///         null, or if a row has a NaN, a +infinity or no logit above -infinity.
void sample(const SamplingArgs& args);
}  // namespace cpu

/// One row of a sampling batch on a GPU; the row's history is in DeviceSamplingArgs::seen.
struct DeviceSamplingRow {
  SamplingParams params;
  std::uint64_t step = 0;
  std::uint32_t stream = 0;
  std::uint32_t history_row = 0;  ///< of `seen`
};

/// As SamplingArgs. A row's parameters must have passed check().
///
/// The same tokens are kept and the same uniform is drawn as on the CPU; sums of probabilities are
/// in fixed point, so that they don't depend on the order in which threads add them up.
struct DeviceSamplingArgs {
  /// Written instead of a token where a row has a NaN, a +infinity or no logit above -infinity.
  static constexpr std::int32_t kNoToken = -1;
  static constexpr std::int64_t kMaxVocabulary = (std::int64_t{1} << 19) - 1;

  const float* logits = nullptr;  ///< [batch_size, vocab_size], rows logits_stride apart
  std::int64_t batch_size = 0;    ///< >= 0
  std::int64_t vocab_size = 0;    ///< in [1, kMaxVocabulary]
  std::int64_t logits_stride = 0;
  /// [batch_size], device memory; may be null if all_greedy without `seen`
  const DeviceSamplingRow* rows = nullptr;
  /// [history rows, ceil(vocab_size / 32)]: bit t % 32 of word t / 32 says that the row has token
  /// t. Read where the repetition penalty is not 1; the bit of the drawn token is set, so that rows
  /// must not share a history row. Null: no row has a penalty.
  std::uint32_t* seen = nullptr;
  std::int32_t* tokens = nullptr;  ///< [batch_size], the drawn tokens
  /// Whether all rows are greedy without a penalty: no other kernel is then needed.
  bool all_greedy = false;
};

namespace cuda {
/// @throws moq::Error if a size is out of range, a pointer is missing, or a launch fails.
void sample(const DeviceSamplingArgs& args, CUstream_st* stream);
}  // namespace cuda

}  // namespace moq::kernels
