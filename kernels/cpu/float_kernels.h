#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/cpu/isa.h"
#include "kernels/norm.h"

/// What the float kernels ask of each instruction set: parts of the work that one thread does,
/// without checks. The files of kernels/cpu check, divide the work and call these.
namespace moq::kernels::cpu {

/// Query rows that share a kv head: row r is token r / group, query head r % group of the head's
/// group (group = num_heads / num_kv_heads). A tile is what one thread takes at once.
struct AttentionTile {
  const AttentionSequence* sequence;
  std::int64_t kv_head;
  std::int64_t first_row;
  std::int64_t num_rows;  ///< in [1, kTileRows]
};

constexpr std::int64_t kTileRows = 64;

// clang-format off
MOQ_FOR_EACH_ISA(
  void activation_elements(Activation activation, const float* input, float* output, std::int64_t size);
  void gated_activation_rows(const GatedActivationArgs& args, std::int64_t begin, std::int64_t end);
  void softmax_rows(const SoftmaxArgs& args, std::int64_t begin, std::int64_t end);

  void layer_norm_rows(const LayerNormArgs& args, std::int64_t begin, std::int64_t end);
  void rms_norm_rows(const RmsNormArgs& args, std::int64_t begin, std::int64_t end);

  /// Floats of scratch memory that attention_tile needs for a tile of `num_rows`.
  std::int64_t attention_scratch_size(std::int64_t num_rows, std::int64_t head_dim);
  void attention_tile(const AttentionArgs& args, const AttentionTile& tile, float* scratch);

  /// The largest score, NaN if one is NaN.
  float largest(const float* scores, std::int64_t size);
  /// weights[i] = exp((scores[i] - largest) / temperature); may be in place.
  void relative_weights(const float* scores, float* weights, std::int64_t size, float largest,
                        float temperature);

  /// Exclusive-or of size / 8 words, `size` a multiple of 8: reads memory as fast as a core can.
  std::uint64_t read_words(const std::byte* memory, std::size_t size, bool prefetch);
)
// clang-format on

}  // namespace moq::kernels::cpu
