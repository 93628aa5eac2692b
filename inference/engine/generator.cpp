#include "inference/engine/generator.h"

#include <algorithm>
#include <chrono>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

using Prompts = std::span<const std::vector<std::int64_t>>;
using Clock = std::chrono::steady_clock;

/// A row in flight.
struct Row {
  std::size_t index;  ///< of its prompt
  std::int64_t slot;
  std::int64_t cached = 0;                ///< tokens in the KV cache
  std::vector<std::int64_t> tokens = {};  ///< the prompt and what was drawn

  std::int64_t pending() const { return static_cast<std::int64_t>(tokens.size()) - cached; }
};

std::int64_t longest(Prompts prompts) {
  std::size_t length = 0;
  for (const auto& prompt : prompts) {
    length = std::max(length, prompt.size());
  }
  return static_cast<std::int64_t>(length);
}

void check(const ModelSpec& spec, Prompts prompts, const GenerationOptions& options) {
  MOQ_CHECK(spec.attention == AttentionKind::kCausal && spec.has_head,
            "generate: the model must be causal and have a language-model head, got ",
            spec.architecture, ": use encode");
  MOQ_CHECK(options.max_new_tokens >= 1, "generate: max_new_tokens must be >= 1, got ",
            options.max_new_tokens);
  const std::int64_t chunk = options.chunk_tokens.value_or(1);
  MOQ_CHECK(options.max_batch >= 1 && chunk >= 1,
            "generate: max_batch and chunk_tokens must be >= 1, got ", options.max_batch, " and ",
            chunk);
  kernels::check(options.sampling);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto length = static_cast<std::int64_t>(prompts[i].size());
    MOQ_CHECK(length >= 1, "generate: a prompt must have at least one token, got none in prompt ",
              i);
    const std::int64_t room = spec.max_positions - length;
    const std::int64_t longest = spec.max_positions - options.max_new_tokens;  // a prompt
    MOQ_CHECK(options.max_new_tokens <= room, "generate: prompt ", i, " of ", length,
              " tokens must fit into the model's ", spec.max_positions,
              " positions with max_new_tokens behind it, got ", options.max_new_tokens,
              room >= 1 ? ": at most " + std::to_string(room) + " would fit"
                        : ": shorten the prompt" +
                              (longest >= 1 ? " to at most " + std::to_string(longest) : ""));
    for (const std::int64_t token : prompts[i]) {
      MOQ_CHECK(token >= 0 && token < spec.vocab_size, "generate: a token must lie in [0, ",
                spec.vocab_size, "), got ", token, " in prompt ", i);
    }
  }
}

/// A CPU's products are as fast at as few tokens as at more; those of a GPU want a tile for each of
/// its multiprocessors, several times over.
constexpr std::int64_t kFewTokens = 512;
constexpr std::int64_t kManyTokens = 4096;

class Generation {
 public:
  Generation(Transformer& model, Prompts prompts, const GenerationOptions& options,
             const OnToken& on_token)
      : model_(model),
        prompts_(prompts),
        options_(options),
        on_token_(on_token),
        chunk_tokens_(
            options.chunk_tokens.value_or(model.device().is_cuda() ? kManyTokens : kFewTokens)),
        max_rows_(std::min(options.max_batch, static_cast<std::int64_t>(prompts.size()))),
        cache_(model.generation_cache(max_rows_, longest(prompts) + options.max_new_tokens)) {
    result_.rows.resize(prompts.size());
    reserve(longest(prompts) * max_rows_);
  }
  /// A generation that an error ends gives its slots back too.
  ~Generation() {
    for (const Row& row : rows_) {
      cache_.free(row.slot);
    }
  }
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  GenerationResult run() {
    for (admit(); !rows_.empty(); admit()) {
      const Clock::time_point start = Clock::now();
      const bool prefill = fill_batch();
      draw();
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      (prefill ? result_.prefill_seconds : result_.decode_seconds) += seconds;
      result_.decode_tokens += prefill ? 0 : static_cast<std::int64_t>(drawing_.size());
    }
    return std::move(result_);
  }

 private:
  /// Makes room for a piece of the prompts: a smaller one than is fast, where memory is short.
  void reserve(std::int64_t prompt_tokens) {
    for (;; chunk_tokens_ /= 2) {
      try {
        model_.reserve(std::max(std::min(prompt_tokens, chunk_tokens_), max_rows_));
        return;
      } catch (const Error&) {
        if (options_.chunk_tokens || chunk_tokens_ <= kFewTokens) {
          throw;
        }
      }
    }
  }

  /// Gives free slots to waiting prompts.
  void admit() {
    while (next_ < prompts_.size() && static_cast<std::int64_t>(rows_.size()) < max_rows_) {
      Row row{.index = next_, .slot = cache_.allocate()};
      row.tokens.reserve(prompts_[next_].size() +
                         static_cast<std::size_t>(options_.max_new_tokens));
      row.tokens = prompts_[next_];
      result_.prompt_tokens += row.pending();
      rows_.push_back(std::move(row));
      ++next_;
    }
  }

  /// Packs the tokens of this step; true if a prompt's piece is among them.
  bool fill_batch() {
    batch_.clear();
    logit_rows_.clear();
    drawing_.clear();
    bool prefill = false;
    std::int64_t room = std::max(chunk_tokens_, static_cast<std::int64_t>(rows_.size()));
    for (std::size_t i = 0; i < rows_.size() && room > 0; ++i) {
      Row& row = rows_[i];
      const std::int64_t count = std::min(row.pending(), room);
      prefill = prefill || row.cached < static_cast<std::int64_t>(prompts_[row.index].size());
      batch_.append({row.tokens.data() + row.cached, static_cast<std::size_t>(count)}, row.slot,
                    row.cached);
      row.cached += count;
      room -= count;
      if (row.pending() == 0) {
        logit_rows_.push_back(batch_.num_tokens() - 1);
        drawing_.push_back(i);
      }
    }
    return prefill;
  }

  /// Computes the batch and draws the next token of every row whose tokens are all in the cache.
  void draw() {
    sampling_.clear();
    for (const std::size_t i : drawing_) {
      const Row& row = rows_[i];
      sampling_.push_back({.params = options_.sampling,
                           .history = row.tokens.data(),
                           .history_length = static_cast<std::int64_t>(row.tokens.size()),
                           .stream = static_cast<std::uint32_t>(row.index),
                           .step = row.tokens.size() - prompts_[row.index].size()});
    }
    const std::span<const std::int64_t> drawn =
        model_.next_tokens(batch_, cache_, logit_rows_, sampling_);
    // Backwards, so that erasing a finished row leaves the earlier indices valid.
    for (std::size_t d = drawing_.size(); d-- > 0;) {
      if (take(rows_[drawing_[d]], drawn[d])) {
        cache_.free(rows_[drawing_[d]].slot);
        rows_.erase(rows_.begin() + static_cast<std::ptrdiff_t>(drawing_[d]));
      }
    }
  }

  /// Appends a token to its row; true if the row has ended.
  bool take(Row& row, std::int64_t token) {
    GeneratedRow& out = result_.rows[row.index];
    row.tokens.push_back(token);
    out.tokens.push_back(token);
    const bool go_on = !on_token_ || on_token_(static_cast<std::int64_t>(row.index), token);
    const auto& stops = options_.stop_tokens;
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
      out.finish_reason = FinishReason::kStopToken;
    } else if (!go_on) {
      out.finish_reason = FinishReason::kStopped;
    } else {
      return static_cast<std::int64_t>(out.tokens.size()) == options_.max_new_tokens;
    }
    return true;
  }

  Transformer& model_;
  Prompts prompts_;
  const GenerationOptions& options_;
  const OnToken& on_token_;
  std::int64_t chunk_tokens_;
  std::int64_t max_rows_;
  KvCache& cache_;
  GenerationResult result_;
  std::size_t next_ = 0;  ///< first prompt that waits
  std::vector<Row> rows_;

  TokenBatch batch_;
  std::vector<std::int64_t> logit_rows_;  ///< tokens of the batch whose logits are needed
  std::vector<std::size_t> drawing_;      ///< their rows
  std::vector<kernels::SamplingRow> sampling_;
};

}  // namespace

GenerationResult generate(Transformer& model, Prompts prompts, const GenerationOptions& options,
                          const OnToken& on_token) {
  check(model.spec(), prompts, options);
  if (prompts.empty()) {
    return {};
  }
  return Generation(model, prompts, options, on_token).run();
}

}  // namespace moq::inference
