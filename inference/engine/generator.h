#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "inference/engine/transformer.h"
#include "kernels/sampling.h"

namespace moq::inference {

struct GenerationOptions {
  std::int64_t max_new_tokens = 128;
  kernels::SamplingParams sampling{.temperature = 0.0F};
  std::vector<std::int64_t> stop_tokens;  ///< a row ends with the first of these, which it keeps
  std::int64_t max_batch = 16;            ///< rows in flight; the others wait for a free slot
  /// Tokens computed at once while prompts are read, >= 1; none: as many as suit the device and its
  /// free memory.
  std::optional<std::int64_t> chunk_tokens = std::nullopt;
};

enum class FinishReason : std::uint8_t {
  kLength,     ///< max_new_tokens were drawn
  kStopToken,  ///< one of stop_tokens was drawn
  kStopped,    ///< the callback ended the row
};

struct GeneratedRow {
  std::vector<std::int64_t> tokens;  ///< the new ones
  FinishReason finish_reason = FinishReason::kLength;
};

struct GenerationResult {
  std::vector<GeneratedRow> rows;
  std::int64_t prompt_tokens = 0;
  double prefill_seconds = 0.0;  ///< steps that read a part of a prompt
  std::int64_t decode_tokens = 0;
  double decode_seconds = 0.0;  ///< steps of one token a row
};

/// Called for each new token; false ends the row.
using OnToken = std::function<bool(std::int64_t row, std::int64_t token)>;

/// Continues prompts, batched as slots become free.
///
/// Each step computes, for every row in flight, the tokens that its cache lacks: a piece of its
/// prompt at first, then the token just drawn. Row i draws from stream i of the seed. What a row
/// becomes does not depend on the rows beside it. Ranks compute the same logits and therefore draw
/// the same tokens.
/// @throws moq::Error before anything is computed if a prompt is empty, or too long for the model
///         with max_new_tokens behind it, has a token outside the vocabulary, or an option is out
///         of range
GenerationResult generate(Transformer& model, std::span<const std::vector<std::int64_t>> prompts,
                          const GenerationOptions& options, const OnToken& on_token = {});

}  // namespace moq::inference
