#include "kernels/rotary.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "kernels/common/check.h"
#include "kernels/common/parallel.h"

namespace moq::kernels::cpu {
namespace {

void check(const RotaryTableArgs& args) {
  MOQ_CHECK(args.theta > 0.0F, "rotary_table: theta must be > 0, got ", args.theta);
  MOQ_CHECK(args.rotary_dim >= 2 && args.rotary_dim % 2 == 0,
            "rotary_table: rotary_dim must be even and >= 2, got ", args.rotary_dim);
  MOQ_CHECK(args.num_positions >= 0, "rotary_table: num_positions must be >= 0, got ",
            args.num_positions);
  MOQ_CHECK(args.scaling == RotaryScaling::kNone || args.factor > 0.0F,
            "rotary_table: factor must be > 0, got ", args.factor);
  if (args.scaling == RotaryScaling::kLlama3) {
    MOQ_CHECK(args.original_max_position > 0.0F,
              "rotary_table: original_max_position must be > 0, got ", args.original_max_position);
    MOQ_CHECK(
        args.low_frequency_factor > 0.0F && args.high_frequency_factor > args.low_frequency_factor,
        "rotary_table: 0 < low_frequency_factor < high_frequency_factor must hold, got ",
        args.low_frequency_factor, " and ", args.high_frequency_factor);
  }
}

/// Frequency of one dimension pair, rounded to float32 as the models were trained.
float scaled_frequency(const RotaryTableArgs& args, std::int64_t pair) {
  const double exponent = 2.0 * static_cast<double>(pair) / static_cast<double>(args.rotary_dim);
  const auto frequency =
      static_cast<float>(1.0 / std::pow(static_cast<double>(args.theta), exponent));
  switch (args.scaling) {
    case RotaryScaling::kNone:
      return frequency;
    case RotaryScaling::kLinear:
      return frequency / args.factor;
    case RotaryScaling::kLlama3: {
      const float turns = args.original_max_position * frequency /
                          (2.0F * std::numbers::pi_v<float>);  // within the trained context
      const float kept = std::clamp((turns - args.low_frequency_factor) /
                                        (args.high_frequency_factor - args.low_frequency_factor),
                                    0.0F, 1.0F);
      return (1.0F - kept) * (frequency / args.factor) + kept * frequency;
    }
  }
  return frequency;
}

void check(const RotaryArgs& args) {
  MOQ_CHECK(args.num_tokens >= 0 && args.num_heads >= 0,
            "rotary: num_tokens and num_heads must be >= 0, got ", args.num_tokens, " and ",
            args.num_heads);
  MOQ_CHECK(args.rotary_dim >= 2 && args.rotary_dim % 2 == 0,
            "rotary: rotary_dim must be even and >= 2, got ", args.rotary_dim);
  MOQ_CHECK(args.head_stride >= args.rotary_dim || args.num_heads <= 1,
            "rotary: head_stride must be >= rotary_dim, got ", args.head_stride, " and ",
            args.rotary_dim);
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    MOQ_CHECK(args.positions[t] >= 0 && args.positions[t] < args.num_positions,
              "rotary: positions must be in [0, ", args.num_positions, "), got ", args.positions[t],
              " for token ", t);
  }
}

}  // namespace

void rotary_table(const RotaryTableArgs& args) {
  check(args);
  const std::int64_t half = args.rotary_dim / 2;
  std::vector<float> frequencies(static_cast<std::size_t>(half));
  for (std::int64_t i = 0; i < half; ++i) {
    frequencies[static_cast<std::size_t>(i)] = scaled_frequency(args, i);
  }
  parallel_for(args.num_positions, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      for (std::int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(p) * frequencies[static_cast<std::size_t>(i)];
        args.cos[p * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
        args.sin[p * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
  });
}

void rotary(const RotaryArgs& args) {
  check(args);
  const std::int64_t half = args.rotary_dim / 2;
  const std::int64_t row = std::max<std::int64_t>(1, args.num_heads * args.rotary_dim);
  const std::int64_t grain = std::max<std::int64_t>(1, 8192 / row);
  parallel_for(args.num_tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float* cos = args.cos + args.positions[t] * half;
      const float* sin = args.sin + args.positions[t] * half;
      for (std::int64_t h = 0; h < args.num_heads; ++h) {
        float* low = args.heads + t * args.token_stride + h * args.head_stride;
        float* high = low + half;
        for (std::int64_t i = 0; i < half; ++i) {
          const float x = low[i];
          const float y = high[i];
          low[i] = x * cos[i] - y * sin[i];
          high[i] = y * cos[i] + x * sin[i];
        }
      }
    }
  });
}

}  // namespace moq::kernels::cpu
