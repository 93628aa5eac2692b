#pragma once

#include <cstdint>

#include "kernels/common/half.h"
#include "kernels/cuda/linear_layout.h"
#include "kernels/linear.h"

/// What every linear kernel does with finished sums: those of one token and two neighbouring rows
/// of the weight, 2j and 2j + 1. Device code only.
namespace moq::kernels::cuda {

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0.0F ? 0.0F : x;  // a NaN stays one
    case Activation::kGelu:
      return 0.5F * x * (1.0F + erff(x * 0.70710678118654752F));
    case Activation::kGeluTanh:
      return 0.5F * x * (1.0F + tanhf(0.79788456080286536F * (x + 0.044715F * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1.0F + expf(-1.702F * x));
    case Activation::kSilu:
      return x / (1.0F + expf(-x));
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
__device__ void load_pair(const Element* from, bool both, float (&values)[2]) {
  ElementPair<Element> pair{};
  if (both && ElementPair<Element>::fits(from)) {
    pair = *reinterpret_cast<const ElementPair<Element>*>(from);
  } else {
    pair.element[0] = from[0];
    if (both) {
      pair.element[1] = from[1];
    }
  }
  values[0] = to_float(pair.element[0]);
  values[1] = to_float(pair.element[1]);
}

template <typename Element>
__device__ void store_pair(Element* to, bool both, const float (&values)[2]) {
  ElementPair<Element> pair;
  store_float(&pair.element[0], values[0]);
  store_float(&pair.element[1], values[1]);
  if (both && ElementPair<Element>::fits(to)) {
    *reinterpret_cast<ElementPair<Element>*>(to) = pair;
  } else {
    to[0] = pair.element[0];
    if (both) {
      to[1] = pair.element[1];
    }
  }
}

/// Where a row of the projection of q, k and v belongs.
struct QkvRow {
  int head;  ///< of q, then of k, then of v
  int row;   ///< of the head; even
  bool rotated;

  __device__ QkvRow(const DeviceQkvOutput& qkv, std::int64_t n_row)
      : head(static_cast<int>(n_row) / qkv.head_dim),
        row(static_cast<int>(n_row) - head * qkv.head_dim),
        rotated(row < qkv.rotary.rotary_dim && head < qkv.num_heads + qkv.num_kv_heads) {}
};

/// What becomes of a pair of sums besides the sums. A kernel may load it while it multiplies.
struct PairInputs {
  float row_scale = 1.0F;
  float bias[2] = {0.0F, 0.0F};
  float residual[2] = {0.0F, 0.0F};  ///< or cosine and sine of the rotation
  std::int32_t cache_row = 0;
};

/// For rows `row` (even) and row + 1, of which the second may lie behind the last of n.
template <typename Element>
__device__ PairInputs load_pair_inputs(const DeviceLinearArgs& args, std::int64_t n,
                                       std::int64_t token, std::int64_t row) {
  PairInputs inputs;
  const bool both = row + 1 < n;
  if (args.row_scales != nullptr) {
    inputs.row_scale = args.row_scales[token];
  }
  if (args.bias != nullptr) {
    load_pair(static_cast<const Element*>(args.bias) + row, both, inputs.bias);
  }
  if (args.residual != nullptr) {
    load_pair(static_cast<const Element*>(args.residual) + token * args.residual_stride + row, both,
              inputs.residual);
  }
  if (args.qkv.head_dim > 0) {
    const DeviceRotary& rotary = args.qkv.rotary;
    const QkvRow place(args.qkv, row);
    if (place.rotated) {
      const std::int64_t angle =
          static_cast<std::int64_t>(rotary.positions[token]) * (rotary.rotary_dim / 2) +
          place.row / 2;
      inputs.residual[0] = rotary.cos[angle];
      inputs.residual[1] = rotary.sin[angle];
    }
    if (args.qkv.pages.keys != nullptr && place.head >= args.qkv.num_heads) {
      inputs.cache_row = args.qkv.cache_rows[token];
    }
  }
  return inputs;
}

/// Rotates a pair of a head of q or k, and writes it to the output or to the cache.
template <typename Element>
__device__ void finish_qkv(const DeviceLinearArgs& args, std::int64_t token, std::int64_t row,
                           float (&values)[2], const PairInputs& inputs) {
  const DeviceQkvOutput& qkv = args.qkv;
  const QkvRow place(qkv, row);
  auto* head = static_cast<Element*>(args.output) + token * args.output_stride +
               static_cast<std::int64_t>(place.head) * qkv.head_dim;
  if (qkv.pages.keys != nullptr && place.head >= qkv.num_heads) {
    if (inputs.cache_row < 0) {
      return;
    }
    const int own = place.head - qkv.num_heads;
    const bool is_key = own < qkv.num_kv_heads;
    const std::int64_t page =
        inputs.cache_row / kPageTokens * qkv.num_kv_heads + (is_key ? own : own - qkv.num_kv_heads);
    head = static_cast<Element*>(is_key ? qkv.pages.keys : qkv.pages.values) +
           (page * kPageTokens + inputs.cache_row % kPageTokens) * qkv.head_dim;
  }
  if (!place.rotated) {
    store_pair(head + place.row, /*both=*/true, values);
    return;
  }
  const auto [cosine, sine] = inputs.residual;
  store_float(head + place.row / 2, values[0] * cosine - values[1] * sine);
  store_float(head + place.row / 2 + qkv.rotary.rotary_dim / 2,
              values[1] * cosine + values[0] * sine);
}

/// The results of rows `row` (even) and row + 1 of a token, each rounded once.
template <typename Element>
__device__ void finish_pair(const DeviceLinearArgs& args, std::int64_t n, std::int64_t token,
                            std::int64_t row, const float (&sums)[2], const PairInputs& inputs) {
  const bool both = row + 1 < n;
  float values[2] = {fmaf(sums[0], inputs.row_scale, inputs.bias[0]),
                     fmaf(sums[1], inputs.row_scale, inputs.bias[1])};
  if (args.qkv.head_dim > 0) {
    finish_qkv<Element>(args, token, row, values, inputs);
    return;
  }
  values[0] = activate(args.activation, values[0]);
  const std::int64_t output_row = token * args.output_stride;
  if (args.gated) {
    const float value = values[0] * values[1];
    if (args.float32_output) {
      static_cast<float*>(args.output)[output_row + row / 2] = value;
    } else {
      store_float(static_cast<Element*>(args.output) + output_row + row / 2, value);
    }
    return;
  }
  values[0] += inputs.residual[0];
  values[1] = activate(args.activation, values[1]) + inputs.residual[1];
  if (args.float32_output) {
    store_pair(static_cast<float*>(args.output) + output_row + row, both, values);
  } else {
    store_pair(static_cast<Element*>(args.output) + output_row + row, both, values);
  }
}

}  // namespace moq::kernels::cuda
