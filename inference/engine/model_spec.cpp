#include "inference/engine/model_spec.h"

#include <limits>

#include "kernels/common/check.h"

namespace moq::inference {
namespace {

void check_at_least(const char* field, std::int64_t value, std::int64_t minimum) {
  MOQ_CHECK(value >= minimum, "model spec: ", field, " must be >= ", minimum, ", got ", value);
  MOQ_CHECK(value <= kMaxSize, "model spec: ", field, " must be <= ", kMaxSize, ", got ", value);
}

/// Kernels compute in float32.
void check_positive(const char* field, double value) {
  MOQ_CHECK(value > 0.0 && value <= std::numeric_limits<float>::max(), "model spec: ", field,
            " must be > 0 and fit a float32, got ", value);
}

}  // namespace

std::int64_t ModelSpec::rotary_dim() const {
  return static_cast<std::int64_t>(rotary_fraction * static_cast<double>(head_dim));
}

void ModelSpec::check() const {
  check_at_least("vocab_size", vocab_size, 1);
  check_at_least("hidden_size", hidden_size, 1);
  check_at_least("num_layers", num_layers, 1);
  check_at_least("num_heads", num_heads, 1);
  check_at_least("num_kv_heads", num_kv_heads, 1);
  check_at_least("head_dim", head_dim, 1);
  check_at_least("intermediate_size", intermediate_size, 1);
  check_at_least("max_positions", max_positions, 1);
  check_at_least("sliding_window", sliding_window, 0);
  check_at_least("position_offset", position_offset, 0);
  check_at_least("num_token_types", num_token_types, 0);
  MOQ_CHECK(num_heads % num_kv_heads == 0, "model spec: num_kv_heads must divide num_heads, got ",
            num_kv_heads, " and ", num_heads);
  MOQ_CHECK(num_heads * head_dim <= kMaxSize,
            "model spec: num_heads * head_dim must be <= ", kMaxSize, ", got ", num_heads, " * ",
            head_dim);
  MOQ_CHECK(norm_epsilon >= 0.0 && norm_epsilon <= std::numeric_limits<float>::max(),
            "model spec: norm_epsilon must be >= 0 and fit a float32, got ", norm_epsilon);
  if (positions == PositionKind::kRotary) {
    check_rotary();
  }
  MOQ_CHECK(!(parallel_residual && norm_place == NormPlace::kPost),
            "model spec: parallel_residual needs norm_place pre, got post");
  MOQ_CHECK(!has_classifier || (has_pooler && num_labels >= 1),
            "model spec: a classifier needs a pooler and num_labels >= 1, got has_pooler ",
            has_pooler, " and num_labels ", num_labels);
}

void ModelSpec::check_rotary() const {
  MOQ_CHECK(rotary_fraction > 0.0 && rotary_fraction <= 1.0,
            "model spec: rotary_fraction must lie in (0, 1], got ", rotary_fraction);
  MOQ_CHECK(rotary_dim() >= 2 && rotary_dim() % 2 == 0,
            "model spec: rotary_fraction * head_dim must be an even number >= 2, got ",
            rotary_fraction, " * ", head_dim);
  check_positive("rope_theta", rope_theta);
  if (rope_scaling != kernels::RotaryScaling::kNone) {
    check_positive("rope_factor", rope_factor);
  }
  if (rope_scaling == kernels::RotaryScaling::kLlama3) {
    check_positive("rope_low_freq_factor", rope_low_freq_factor);
    check_positive("rope_high_freq_factor", rope_high_freq_factor);
    MOQ_CHECK(rope_high_freq_factor > rope_low_freq_factor,
              "model spec: rope_high_freq_factor must be > rope_low_freq_factor, got ",
              rope_high_freq_factor, " and ", rope_low_freq_factor);
    check_at_least("rope_original_positions", rope_original_positions, 1);
  }
}

}  // namespace moq::inference
