#pragma once

#include <cstdint>
#include <string>

#include "kernels/activation.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"

namespace moq::inference {

using kernels::NormKind;

/// kPre: x + f(norm(x)), and one norm after the last layer. kPost: norm(x + f(x)), as in BERT.
enum class NormPlace : std::uint8_t { kPre, kPost };

enum class AttentionKind : std::uint8_t { kCausal, kBidirectional };

enum class PositionKind : std::uint8_t {
  kNone,
  kLearned,  ///< a table added to the token embedding
  kRotary,   ///< rotation of q and k, half-split form
  kAlibi,    ///< attention bias linear in the distance
};

/// Largest size that a spec may hold: sums and products of two of them stay within 64 bits.
constexpr std::int64_t kMaxSize = std::int64_t{1} << 31;

/// One transformer family as data: all that Transformer::forward must know beside the weights.
///
/// Shapes follow torch's Linear: a projection is [out features, in features]. The defaults are
/// those of a plain pre-norm causal decoder; a policy (inference/policies) fills in the rest from
/// config.json.
struct ModelSpec {
  std::string architecture = {};  ///< as config.json names it, for messages

  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;       ///< divides num_heads; 0 in a policy: as num_heads
  std::int64_t head_dim = 0;           ///< 0 in a policy: hidden_size / num_heads
  std::int64_t intermediate_size = 0;  ///< 0 in a policy: 4 * hidden_size
  std::int64_t max_positions = 0;      ///< longest sequence, in tokens
  std::int64_t sliding_window = 0;     ///< keys that a token sees at most; 0: all

  NormKind norm = NormKind::kLayerNorm;
  NormPlace norm_place = NormPlace::kPre;
  double norm_epsilon = 1e-5;
  bool norm_bias = true;           ///< LayerNorm only
  bool embedding_norm = false;     ///< a norm right after the embedding (BERT)
  bool parallel_residual = false;  ///< x + attention(norm1(x)) + ffn(norm2(x))

  AttentionKind attention = AttentionKind::kCausal;
  bool qk_norm = false;  ///< RMSNorm over each head of q and k, before the rotation (Qwen3)
  bool qkv_bias = true;
  bool out_bias = true;

  PositionKind positions = PositionKind::kLearned;
  std::int64_t position_offset = 0;  ///< row of the position table that token 0 reads (RoBERTa: 2)
  std::int64_t num_token_types = 0;  ///< rows of the token-type table; 0: none
  double rope_theta = 10000.0;
  double rotary_fraction = 1.0;  ///< share of head_dim that is rotated
  kernels::RotaryScaling rope_scaling = kernels::RotaryScaling::kNone;
  double rope_factor = 1.0;
  double rope_low_freq_factor = 1.0;            ///< kLlama3
  double rope_high_freq_factor = 4.0;           ///< kLlama3
  std::int64_t rope_original_positions = 8192;  ///< kLlama3

  kernels::Activation activation = kernels::Activation::kGelu;
  bool gated = false;  ///< down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))
  bool ffn_bias = true;

  bool has_head = false;   ///< a language-model head: vocab_size logits per token
  bool tied_head = false;  ///< the head is the token embedding
  bool head_bias = false;
  bool head_transform = false;  ///< the head reads norm(activation(dense(x))) (masked LMs)

  bool has_pooler = false;  ///< activation(dense(first token))
  kernels::Activation pooler_activation = kernels::Activation::kTanh;
  bool has_classifier = false;  ///< a linear classifier on the pooled output
  std::int64_t num_labels = 0;

  std::int64_t rotary_dim() const;

  /// The ranges of the fields and the arithmetic rules between them, checked once before anything
  /// is loaded.
  /// @throws moq::Error naming the field, what must hold and what was found.
  void check() const;

 private:
  void check_rotary() const;
};

}  // namespace moq::inference
