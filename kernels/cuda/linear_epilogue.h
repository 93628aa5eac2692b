#pragma once

#include <cstdint>

#include "kernels/cuda/linear_layout.h"
#include "kernels/cuda/ptx.h"
#include "kernels/cuda/vectors.h"
#include "kernels/linear.h"

/// What every linear kernel does with finished sums: those of one token and two neighbouring rows
/// of the weight, 2j and 2j + 1. Device code only.
namespace moq::kernels::cuda {

/// 2^x with a relative error of 2^-22, of results that are normal numbers or 0.
__device__ inline float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// x / (1 + e^-y), 0 for y below -87.
__device__ inline float times_sigmoid(float x, float y) {
  return __fdividef(x, 1.0F + exp2_of(-1.44269504F * y));
}

/// x * Phi(x) = max(x, 0) - |x| / 2 * erfc(|x| / sqrt(2)) within 2^-23 |x|, and within 2^-15 of
/// itself down to x = -5.5. The logarithm of erfc to base 2 is a polynomial, fitted for the least
/// of its greatest errors, those of small results weighted by 2^-10 at least.
__device__ inline float gelu(float x) {
  const float a = fminf(fabsf(x), 5.75F);  // behind, the second term stays below 2^-25
  float p = 2.0264313604911877e-07F;
  p = fmaf(p, a, -4.845544481213437e-06F);
  p = fmaf(p, a, 4.611828626366332e-05F);
  p = fmaf(p, a, -0.00019284179143141955F);
  p = fmaf(p, a, -0.0001466248359065503F);
  p = fmaf(p, a, 0.007090377155691385F);
  p = fmaf(p, a, -0.05251770466566086F);
  p = fmaf(p, a, -0.45920154452323914F);
  p = fmaf(p, a, -1.1511058807373047F);
  return fmaf(-a, exp2_of(fmaf(p, a, -1.0F)), positive_part(x));
}

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return positive_part(x);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return times_sigmoid(x, 1.59576912160573071F * fmaf(0.044715F * x * x, x, x));
    case Activation::kQuickGelu:
      return times_sigmoid(x, 1.702F * x);
    case Activation::kSilu:
      return times_sigmoid(x, x);
    case Activation::kTanh:
      return tanhf(x);
  }
  return x;
}

/// Two neighbouring elements, in one access where their address allows it.
template <typename Element>
struct alignas(2 * sizeof(Element)) ElementPair {
  Element element[2];

  __device__ static bool fits(const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % sizeof(ElementPair) == 0;
  }
};

/// The second element, where there is none, is 0.
template <typename Element>
__device__ ElementPair<Element> load_pair(const Element* from, bool both) {
  ElementPair<Element> pair{};
  if (both && ElementPair<Element>::fits(from)) {
    pair = *reinterpret_cast<const ElementPair<Element>*>(from);
  } else {
    pair.element[0] = from[0];
    if (both) {
      pair.element[1] = from[1];
    }
  }
  return pair;
}

template <typename Element>
__device__ void store_pair(Element* to, bool both, const float (&values)[2]) {
  ElementPair<Element> pair;
  round_to_element(values[0], pair.element[0]);
  round_to_element(values[1], pair.element[1]);
  if (both && ElementPair<Element>::fits(to)) {
    *reinterpret_cast<ElementPair<Element>*>(to) = pair;
  } else {
    to[0] = pair.element[0];
    if (both) {
      to[1] = pair.element[1];
    }
  }
}

/// What the results of a token need besides its sums. Kernels ahead in the stream may have written
/// it.
struct TokenInputs {
  float row_scale = 1.0F;
  std::int32_t position = 0;
  std::int32_t cache_row = 0;
};

__device__ inline TokenInputs load_token_inputs(const DeviceLinearArgs& args, std::int64_t token) {
  TokenInputs inputs;
  if (args.row_scales != nullptr) {
    inputs.row_scale = args.row_scales[token];
  }
  if (args.qkv.rotary.rotary_dim > 0) {
    inputs.position = args.qkv.rotary.positions[token];
  }
  if (args.qkv.pages.keys != nullptr) {
    inputs.cache_row = args.qkv.cache_rows[token];
  }
  return inputs;
}

/// Where a token's head of k or v lies in the cache; null if it is not written.
template <typename Element>
__device__ Element* cache_head(const DeviceQkvOutput& qkv, int head, std::int32_t cache_row) {
  if (cache_row < 0) {
    return nullptr;
  }
  const int own = head - qkv.num_heads;
  const bool is_key = own < qkv.num_kv_heads;
  const std::int64_t page =
      cache_row / kPageTokens * qkv.num_kv_heads + (is_key ? own : own - qkv.num_kv_heads);
  return static_cast<Element*>(is_key ? qkv.pages.keys : qkv.pages.values) +
         (page * kPageTokens + cache_row % kPageTokens) * qkv.head_dim;
}

/// What a pair of rows needs: `row` (even) and row + 1, of which the second may lie behind the last
/// of n. A kernel may load it while it multiplies; nothing is converted before it is used.
template <typename Element>
struct RowInputs {
  ElementPair<Element> bias{};
  ElementPair<Element> residual{};
  float cosine = 0.0F;
  float sine = 0.0F;
  /// Where the results go, as Element or float: of a gated pair the one, of a rotated one the first
  /// and another rotary_dim / 2 behind it, else both. Null: nowhere.
  void* target = nullptr;
  // of the projection of q, k and v: where the row belongs
  std::int32_t head = 0;
  std::int32_t head_row = 0;
  bool rotated = false;

  /// The part that is as constant as the weight.
  __device__ void load_constants(const DeviceLinearArgs& args, std::int64_t n, std::int64_t row) {
    if (args.bias != nullptr) {
      bias = load_pair(static_cast<const Element*>(args.bias) + row, row + 1 < n);
    }
    const DeviceQkvOutput& qkv = args.qkv;
    if (qkv.head_dim > 0) {
      head = static_cast<int>(row) / qkv.head_dim;
      head_row = static_cast<int>(row) - head * qkv.head_dim;
      rotated = head_row < qkv.rotary.rotary_dim && head < qkv.num_heads + qkv.num_kv_heads;
    }
  }

  /// The rest.
  __device__ void load_activations(const DeviceLinearArgs& args, std::int64_t n, std::int64_t token,
                                   std::int64_t row, const TokenInputs& of_token) {
    if (args.residual != nullptr) {
      residual =
          load_pair(static_cast<const Element*>(args.residual) + token * args.residual_stride + row,
                    row + 1 < n);
    }
    if (rotated) {
      const DeviceRotary& rotary = args.qkv.rotary;
      const std::int64_t angle =
          static_cast<std::int64_t>(of_token.position) * (rotary.rotary_dim / 2) + head_row / 2;
      cosine = rotary.cos[angle];
      sine = rotary.sin[angle];
    }
    find_target(args, token, row, of_token);
  }

 private:
  __device__ void find_target(const DeviceLinearArgs& args, std::int64_t token, std::int64_t row,
                              const TokenInputs& of_token) {
    const DeviceQkvOutput& qkv = args.qkv;
    const std::int64_t output_row = token * args.output_stride;
    auto* output = static_cast<Element*>(args.output) + output_row;
    if (qkv.head_dim == 0) {
      const std::int64_t col = args.gated ? row / 2 : row;
      target = args.float32_output
                   ? static_cast<void*>(static_cast<float*>(args.output) + output_row + col)
                   : static_cast<void*>(output + col);
      return;
    }
    Element* of_head = qkv.pages.keys != nullptr && head >= qkv.num_heads
                           ? cache_head<Element>(qkv, head, of_token.cache_row)
                           : output + static_cast<std::int64_t>(head) * qkv.head_dim;
    target = of_head == nullptr ? nullptr : of_head + (rotated ? head_row / 2 : head_row);
  }
};

/// What becomes of a pair of sums besides the sums.
template <typename Element>
struct PairInputs {
  TokenInputs of_token;
  RowInputs<Element> of_row;
};

template <typename Element>
__device__ PairInputs<Element> load_pair_inputs(const DeviceLinearArgs& args, std::int64_t n,
                                                std::int64_t token, std::int64_t row) {
  PairInputs<Element> inputs;
  inputs.of_token = load_token_inputs(args, token);
  inputs.of_row.load_constants(args, n, row);
  inputs.of_row.load_activations(args, n, token, row, inputs.of_token);
  return inputs;
}

/// The results of a pair of sums, each rounded once. `both`: the second row exists.
template <typename Element>
__device__ void finish_pair(const DeviceLinearArgs& args, bool both, const float (&sums)[2],
                            const PairInputs<Element>& inputs) {
  const auto& [of_token, of_row] = inputs;
  auto* const target = static_cast<Element*>(of_row.target);
  float values[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    values[i] = fmaf(sums[i], of_token.row_scale, number_of(of_row.bias.element[i]));
  }
  if (of_row.rotated) {
    if (target != nullptr) {
      round_to_element(values[0] * of_row.cosine - values[1] * of_row.sine, *target);
      round_to_element(values[1] * of_row.cosine + values[0] * of_row.sine,
                       target[args.qkv.rotary.rotary_dim / 2]);
    }
    return;
  }
  if (args.activation != Activation::kNone) {
    values[0] = activate(args.activation, values[0]);
    if (!args.gated) {
      values[1] = activate(args.activation, values[1]);
    }
  }
  if (args.gated) {
    const float value = values[0] * values[1];
    if (args.float32_output) {
      *static_cast<float*>(of_row.target) = value;
    } else {
      round_to_element(value, *target);
    }
    return;
  }
  values[0] += number_of(of_row.residual.element[0]);
  values[1] += number_of(of_row.residual.element[1]);
  if (args.float32_output) {
    store_pair(static_cast<float*>(of_row.target), both, values);
  } else if (target != nullptr) {
    store_pair(target, both, values);
  }
}

}  // namespace moq::kernels::cuda
