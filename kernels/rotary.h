#pragma once

#include <cstdint>

namespace moq::kernels {

/// How the frequencies of a rotary embedding are stretched beyond the trained context.
enum class RotaryScaling : std::uint8_t {
  kNone,
  kLinear,  ///< every frequency divided by factor
  kLlama3,  ///< low frequencies divided by factor, high ones kept, a linear blend between the two
};

/// The cosines and sines that `rotary` reads:
///
///   cos[p, i] = cos(p * frequency[i]),   frequency[i] = theta^(-2 i / rotary_dim), then scaled
///
/// The angle is rounded to float32, as the models were trained; its cosine and sine are correctly
/// rounded. Source: Su et al., RoFormer, 2021; llama3 scaling as in Hugging Face's
/// `rope_type: llama3`, wavelengths measured against original_max_position.
struct RotaryTableArgs {
  float theta;                 ///< base of the frequencies, > 0
  std::int64_t rotary_dim;     ///< rotated dimensions of a head, even, >= 2
  std::int64_t num_positions;  ///< >= 0
  RotaryScaling scaling = RotaryScaling::kNone;
  float factor = 1.0F;                 ///< kLinear, kLlama3; > 0
  float low_frequency_factor = 1.0F;   ///< kLlama3
  float high_frequency_factor = 4.0F;  ///< kLlama3; > low_frequency_factor
  float original_max_position = 0.0F;  ///< kLlama3: trained context, tokens, > 0
  float* cos;                          ///< [num_positions, rotary_dim / 2], written
  float* sin;                          ///< [num_positions, rotary_dim / 2], written
};

/// Rotates heads in place, the half-split form (GPT-NeoX, Llama): with h = rotary_dim / 2 and p the
/// token's position,
///
///   x[i]     = x[i] * cos[p, i] - x[h + i] * sin[p, i]
///   x[h + i] = x[h + i] * cos[p, i] + x[i] * sin[p, i],   0 <= i < h
///
/// Dimensions from rotary_dim on stay as they are. Heads lie head_stride apart in a token's row,
/// rows token_stride apart: in packed [q | k | v] rows one call rotates q and k when num_heads
/// counts the heads of both. float32, no accumulation.
struct RotaryArgs {
  float* heads;                   ///< first head of the first token
  std::int64_t num_tokens;        ///< >= 0
  std::int64_t num_heads;         ///< >= 0
  std::int64_t token_stride;      ///< elements
  std::int64_t head_stride;       ///< elements, >= rotary_dim
  std::int64_t rotary_dim;        ///< even, >= 2
  const std::int64_t* positions;  ///< [num_tokens], each in [0, num_positions)
  const float* cos;               ///< [num_positions, rotary_dim / 2]
  const float* sin;               ///< [num_positions, rotary_dim / 2]
  std::int64_t num_positions;
};

namespace cpu {
/// @throws moq::Error if a size or a scaling parameter is out of range.
void rotary_table(const RotaryTableArgs& args);
/// @throws moq::Error if a size is out of range or a position lies outside the table; nothing has
///         been rotated then.
void rotary(const RotaryArgs& args);
}  // namespace cpu

}  // namespace moq::kernels
